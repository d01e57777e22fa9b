"""What `make bench-gpu` runs, without a GPU: its numbers mean nothing then, its forms do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import NOT_MEASURED, table

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    given = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = run("--quick", "--out", str(folder), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_the_kernel_agrees_with_float64_and_every_way_has_a_line(found):
    results, page = found
    assert 0 < results["parity"]["relative_difference"] <= results["parity"]["allowed"] == 1e-2
    ways = {one["way"] for one in results["encoder"]}
    assert ways == {
        "fused kernel, CUDA graph",
        "fused kernel",
        "published form, eager bf16",
        "published form, compiled bf16",
    }
    assert page == table(results)
    assert all(way in page for way in ways)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is without a GPU")
def test_what_needs_a_gpu_is_not_measured_and_says_why(found):
    results, page = found
    graphs = [one for one in results["encoder"] if one["way"] == "fused kernel, CUDA graph"]
    assert {(one["rows_s"], one["why"]) for one in graphs} == {(NOT_MEASURED, "RuntimeError: there is no CUDA device")}
    engines = {one["engine"]: one for one in results["ranker"]}
    assert engines["tensorrt"]["why"].startswith("tensorrt is not installed")
    assert f"{NOT_MEASURED}: {engines['tensorrt']['why']}" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is without a GPU")
def test_without_a_gpu_nothing_is_written_unless_it_is_a_trial(tmp_path):
    done = run("--out", str(tmp_path))
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "no CUDA device" in done.stderr
