"""Which PyTorch `make test` installs, with a pip that only writes down what it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PyPI's build is for CPUs elsewhere")


def chosen(choice, tmp_path, *, reachable):
    pip = tmp_path / "pip"
    refusal = "" if reachable else "echo 'ERROR: No matching distribution found for torch' >&2; exit 1"
    pip.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n{refusal}\n')
    pip.chmod(0o755)
    command = [ROOT / "deploy" / "install" / "torch.sh", choice, pip, "install"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    asked = tmp_path / "asked"
    return done, asked.read_text() if asked.exists() else ""


def test_the_build_for_cpus_comes_from_pytorchs_index_and_nothing_else_does(tmp_path):
    done, asked = chosen("cpu", tmp_path, reachable=True)
    assert done.stdout == "with\n"
    assert "--no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==" in asked
    assert asked.strip().endswith("+cpu")


def test_a_choice_that_cannot_be_had_fails(tmp_path):
    for choice in ("cpu", "pypi"):
        done, _ = chosen(choice, tmp_path, reachable=False)
        assert done.returncode != 0
        assert "No matching distribution" in done.stderr
        assert "with" not in done.stdout


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="here PyPI's build is chosen")
def test_without_a_choice_and_without_pytorchs_index_it_is_said_that_tests_will_be_skipped(tmp_path):
    done, _ = chosen("auto", tmp_path, reachable=False)
    assert (done.returncode, done.stdout) == (0, "without\n")
    assert "the tests that need it are skipped" in done.stderr
    assert "TORCH=pypi, which installs PyPI's build (2.7 GB" in done.stderr


def test_none_installs_nothing_and_a_word_that_is_no_choice_is_refused(tmp_path):
    done, asked = chosen("none", tmp_path, reachable=True)
    assert (done.stdout, asked) == ("without\n", "")
    done, asked = chosen("cuda", tmp_path, reachable=True)
    assert done.returncode == 1
    assert "not one of auto, cpu, pypi, none" in done.stderr
