"""Run NVIDIA's tools on one launch: ncu, the profiler, and compute-sanitizer, which finds accesses out of bounds."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.numbers import Numbers

NCU_FILE, MEMCHECK_FILE = "ncu.csv", "memcheck.txt"
_KERNEL = "encode_rows"
_SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats",
    "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis",
)  # fmt: skip
_WORDS = 500
#: Shortest time in which a tool can start, in seconds.
_NEEDS_S = 5.0
_BYTES_MAX = 1 << 20


def ncu(out: Path, numbers: Numbers) -> None:
    """Profile one launch of 16 x 512 rows, at the card's current clock rates."""
    file = out / NCU_FILE

    def measured() -> dict[str, Any]:
        command = [
            "ncu", "--clock-control", "none", "--kernel-name", f"regex:{_KERNEL}", "--launch-count", "1",
            "--csv", "--page", "details", "--log-file", str(file),
            *(part for section in _SECTIONS for part in ("--section", section)),
        ]  # fmt: skip
        said = _run(command, _launch(numbers, 16, 512), file, numbers)
        if numbers.dry_run:
            return {"without": "ncu", "said": said}
        report = file.read_text(errors="replace")
        metrics = metrics_of(report)
        if not metrics:
            raise ToolError(f"ncu reported nothing: {report[-_WORDS:]} {said}")
        return {"requests": 16, "rows": 512, "metrics": metrics}

    numbers.measure("one launch", measured, _NEEDS_S)


def sanitizer(out: Path, numbers: Numbers) -> None:
    """Check one small launch for accesses out of bounds, with every tensor in separate memory."""
    file = out / MEMCHECK_FILE

    def measured() -> dict[str, Any]:
        command = [
            "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "CUDA_MODULE_LOADING=LAZY",
            "compute-sanitizer", "--tool", "memcheck", "--kernel-name", f"kns={_KERNEL}", "--report-api-errors", "no",
            "--print-limit", "20", "--log-file", str(file),
        ]  # fmt: skip
        said = _run(command, _launch(numbers, 2, 9), file, numbers)
        if numbers.dry_run:
            return {"without": "compute-sanitizer", "said": said}
        report = file.read_text(errors="replace")
        file.write_text(report[:_BYTES_MAX])
        found = re.search(r"ERROR SUMMARY: (\d+) error", report)
        if found is None:
            raise ToolError(f"compute-sanitizer printed no summary: {report[-_WORDS:]}")
        return {"errors": int(found[1]), "holds": found[1] == "0"}

    numbers.measure("memcheck", measured, _NEEDS_S)


class ToolError(Exception):
    """A tool failed."""


def metrics_of(report: str) -> dict[str, str]:
    """Parse the output of `ncu --csv --page details` into values by "section: metric [unit]"."""
    lines = report.splitlines()
    head = next((number for number, line in enumerate(lines) if '"Metric Name"' in line), None)
    if head is None:
        return {}
    rows = csv.DictReader(io.StringIO("\n".join(lines[head:])))
    return {
        f"{row['Section Name']}: {row['Metric Name']}" + (f" [{row['Metric Unit']}]" if row["Metric Unit"] else ""): (
            row["Metric Value"]
        )
        for row in rows
        if row.get("Metric Name") and row.get("Metric Value")
    }


def _launch(numbers: Numbers, requests: int, rows: int) -> list[str]:
    shape = ["1", "2"] if numbers.dry_run else [str(requests), str(rows)]
    return [sys.executable, "-m", "bench.gpu.measurements.launch", *shape, *["--dry-run"] * numbers.dry_run]


def _run(tool: Sequence[str], launch: Sequence[str], report: Path, numbers: Numbers) -> str:
    """Run the launch, under the tool unless this is a dry run. Return the end of its output.

    Raises:
        ToolError: it failed; the message holds the end of its output or report.
        subprocess.TimeoutExpired: the time of the phase was up.
    """
    command = launch if numbers.dry_run else [*tool, *launch]
    # A file, not a pipe: processes left by a killed tool would keep a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, timeout=numbers.left_s(), check=False)
        said.seek(0)
        words = said.read()[-_WORDS:].strip()
    if done.returncode:
        written = report.read_text(errors="replace")[-_WORDS // 2 :] if report.exists() else ""
        raise ToolError(f"it ended with {done.returncode}: {f'{written} {words[-_WORDS // 2 :]}'.strip()}")
    return words
