"""NVIDIA's tools, played by scripts, and CUDA's events, played by a clock: what only a GPU would otherwise reach."""

from __future__ import annotations

import os
import time

import pytest
import torch

from bench.gpu.measurements import timing, tools
from bench.gpu.measurements.timing import graphed, rates, seconds_of
from bench.gpu.numbers import Numbers, file_of, read

NCU_CSV = """==PROF== Connected to process 7
==PROF== Profiling "encode_rows": 0%....100% - 12 passes
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","encode_rows","GPU Speed Of Light Throughput","Duration","us","812.5",""
"0","encode_rows","Launch Statistics","Registers Per Thread","register/thread","255",""
"0","encode_rows","Occupancy","","","","Achieved Occupancy"
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Return a function that puts a script first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name, text):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)

    return put


#: Sets `file` to where the report goes.
LOG_FILE = 'while [ "$1" != --log-file ]; do shift; done; file=$2\n'


def measured(phase, out, left_s=60.0):
    numbers = Numbers(out, phase, time.monotonic() + left_s, dry_run=False)
    {"ncu": tools.ncu, "sanitizer": tools.sanitizer}[phase](out, numbers)
    (line,) = read(file_of(out, dry_run=False)).lines
    return line


def test_what_ncu_reports_is_kept_by_section_and_metric(tool, tmp_path):
    (tmp_path / "report").write_text(NCU_CSV)
    tool("ncu", f'echo "$@" > {tmp_path}/given\n{LOG_FILE}cp {tmp_path}/report "$file"')
    assert measured("ncu", tmp_path / "out")["metrics"] == {
        "GPU Speed Of Light Throughput: Duration [us]": "812.5",
        "Launch Statistics: Registers Per Thread [register/thread]": "255",
    }
    given = (tmp_path / "given").read_text()
    assert "--clock-control none" in given
    assert "--launch-count 1 " in given
    assert "-m bench.gpu.measurements.launch 16 512\n" in given


@pytest.mark.parametrize("code", [0, 1])
def test_a_tool_that_may_not_look_is_quoted(tool, tmp_path, code):
    tool("ncu", LOG_FILE + f'echo "==ERROR== ERR_NVGPUCTRPERM" > "$file"; echo "launched: 8192 rows"; exit {code}')
    assert "ERR_NVGPUCTRPERM" in measured("ncu", tmp_path)["not_measured"]


def test_a_tool_that_fails_is_quoted(tool, tmp_path):
    tool("ncu", "echo 'no such section'; exit 9")
    assert measured("ncu", tmp_path)["not_measured"] == "ToolError: it ended with 9: no such section"


def test_a_tool_that_hangs_with_what_it_started_costs_its_number_alone(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "_NEEDS_S", 0.0)
    tool("ncu", f"sleep 600 & echo $! > {tmp_path}/child; wait")
    try:
        assert measured("ncu", tmp_path, left_s=0.5)["not_measured"].startswith("TimeoutExpired: ")
    finally:
        os.kill(int((tmp_path / "child").read_text()), 9)  # its phase's group is killed, which a test's is not


@pytest.mark.parametrize(("errors", "holds"), [(0, True), (3, False)])
def test_what_the_sanitizer_finds_is_counted(tool, tmp_path, errors, holds):
    tool("compute-sanitizer", f'{LOG_FILE}echo "========= ERROR SUMMARY: {errors} errors" > "$file"')
    line = measured("sanitizer", tmp_path)
    assert (line["errors"], line["holds"]) == (errors, holds)


def test_a_sanitizer_without_a_summary_measured_nothing(tool, tmp_path):
    tool("compute-sanitizer", LOG_FILE + 'echo "========= Internal error" > "$file"')
    assert "Internal error" in measured("sanitizer", tmp_path)["not_measured"]


class Device:
    """A GPU whose every run takes so many seconds, and whose clock is the host's too."""

    def __init__(self, monkeypatch, run_s):
        self.now_s, self.runs, self.captured, device = 0.0, 0, False, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at_s = device.now_s

            def elapsed_time(self, other):
                return (other.at_s - self.at_s) * 1e3

        def run():
            device.now_s += run_s
            device.runs += 1

        self.run = run
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now_s)


def test_runs_are_timed_by_the_devices_clock_and_the_warm_ones_do_not_count(monkeypatch):
    device = Device(monkeypatch, run_s=0.01)
    seconds = seconds_of(device.run, torch.device("cuda"), repeats=50, until_s=1e9)
    assert seconds == pytest.approx([0.01] * 50)
    assert device.runs == 53
    assert rates(seconds, 8192) == pytest.approx({"rows_s": 819_200, "ms_p50": 10, "ms_p99": 10, "runs": 50})


@pytest.mark.parametrize(("until_s", "runs"), [(-1.0, 1), (3.5, 1), (8.0, 5), (20.5, 18), (1e9, 200)])
def test_no_run_begins_after_the_phases_end_but_the_first(monkeypatch, until_s, runs):
    device = Device(monkeypatch, run_s=1.0)  # the first three are warm
    assert len(seconds_of(device.run, torch.device("cuda"), 200, until_s)) == runs


def test_a_graph_is_captured_after_a_run_and_replayed_alone(monkeypatch):
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    class Entered:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            done.append(f"enter {self.name}")

        def __exit__(self, *_):
            done.append(f"leave {self.name}")

        def synchronize(self):
            done.append("wait")

        def wait_stream(self, other):
            done.append(f"wait for {other}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Entered("stream"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current one")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: Entered("capture"))
    replay = graphed(lambda: done.append("run"))
    replay()
    captured = ["enter capture", "run", "leave capture"]
    assert done == ["wait for the current one", "enter stream", "run", "leave stream", "wait", *captured, "replay"]
