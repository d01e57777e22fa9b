"""The whole ten minutes without a GPU: tiny shapes in Triton's interpreter. That numbers come counts, not which."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu.measurements.served import summary
from bench.gpu.numbers import DRY_FILE, FILE, read
from bench.gpu.plan import PHASES, expected
from loadtest.open_loop import STAGES, Samples

ROOT = Path(__file__).parents[3]


def script(name, *arguments):
    command = [ROOT / "bench" / name, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["GPU_PYTHON"] = sys.executable
    return subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = script("gpu-ten-minutes.sh", "--dry-run", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    return out


def test_every_number_of_every_phase_comes_and_is_marked(dry_run):
    found = read(dry_run / DRY_FILE)
    assert found.unreadable == 0
    assert all(line["dry_run"] is True for line in found.lines)
    for phase in PHASES:
        lines = {line["what"]: line for line in found.lines if line["phase"] == phase}
        assert set(lines) == {*expected(phase, dry_run=True), "the phase"}
        assert [line for line in lines.values() if "not_measured" in line or "ended" in line] == []
        assert all(line.get("holds", True) for line in lines.values())


def test_what_a_dry_run_leaves_can_be_taken_back(dry_run):
    assert {file.name for file in dry_run.iterdir()} == {DRY_FILE, "dry-run.json", "dry-run.md", "log.txt"}
    page = (dry_run / "dry-run.md").read_text()
    assert page.startswith("# DRY RUN")
    assert "not measured" not in page


def test_what_runs_without_a_gpus_tools_says_so(dry_run):
    without = {line["phase"]: line["without"] for line in read(dry_run / DRY_FILE).lines if "without" in line}
    assert without == {
        "encoder": "CUDA graphs",
        "tuning": "CUDA graphs",
        "ncu": "ncu",
        "sanitizer": "compute-sanitizer",
        "public": "torch.compile",
    }


def test_what_was_measured_is_named_also_without_a_repository(dry_run):
    (source,) = (line for line in read(dry_run / DRY_FILE).lines if line["what"] == "source")
    said = subprocess.check_output("LC_ALL=C; cat kernels/gpu/*.py | sha256sum", shell=True, cwd=ROOT, text=True)
    assert source["kernels_gpu_sha256"] == said.split()[0]


def test_the_rerun_runs_the_phases_that_are_named(tmp_path):
    done = script("gpu-four-minutes.sh", "--dry-run", "--out", tmp_path, "parity", "facts")
    assert re.findall(r"s  (\w+)$", done.stdout, re.MULTILINE) == ["facts", "parity"]
    assert done.returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is without a GPU")
def test_a_real_run_without_a_gpu_measures_nothing_and_says_why(tmp_path):
    # `parity` has 60 s, and leaves `ceilings` (10 s) what it does not need: a busy machine loads PyTorch slowly.
    phases = ("parity", "ceilings", "engine", "two-engines", "served", "table")
    done = script("gpu-four-minutes.sh", "--out", tmp_path, *phases)
    assert done.returncode == 1
    lines = read(tmp_path / FILE).lines
    measured = {line["phase"] for line in lines if "not_measured" not in line and line["what"] != "the phase"}
    assert measured == set()
    for phase in ("engine", "two-engines", "served"):  # which would run on the CPU, and be taken for a GPU's
        (ended,) = (line["ended"] for line in lines if line["phase"] == phase and line["what"] == "the phase")
        assert ended.endswith("PyTorch finds no GPU")
    page = (tmp_path / "gpu.md").read_text()
    assert re.search(r"bf16 products: not measured: \w+: .*(CUDA|NVIDIA)", page)


def test_what_several_clients_saw_is_one_summary():
    def seen(latency_ms, statuses, degradations=()):
        count = len(statuses)
        degradations = degradations or ((),) * count
        return Samples(
            np.arange(count, dtype=float), np.zeros(count), np.array(latency_ms) / 1e3, tuple(statuses),
            np.zeros((count, len(STAGES)), np.uint32), degradations, (), 0.0,
        )  # fmt: skip

    found = summary([seen([2, 4], ["OK", "OK"]), seen([6, 30, 1], ["OK", "OK", "UNAVAILABLE"])], 2.0)
    assert (found["offered_s"], found["goodput_s"], found["good_share"]) == (2.5, 1.5, 0.6)
    assert found["ms_p50"] == pytest.approx(5.0)
    assert found["statuses"] == {"OK": 4, "UNAVAILABLE": 1}
    degraded = summary([seen([2, 2], ["OK", "OK"], ((), ("trimmed",)))], 1.0)
    assert (degraded["goodput_s"], degraded["degraded"]) == (1.0, 1)
