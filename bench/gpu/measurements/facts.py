"""Record what the numbers depend on: the card, the versions, the machine and the sources."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu.carried import ROOT, carried, machine_has
from bench.gpu.numbers import Numbers

_TOOLS = ("gcc", "nvcc", "ncu", "compute-sanitizer", "cuobjdump", "nvidia-smi")
_ASKED = (
    "name", "memory.total", "driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.current.sm", "power.limit",
    "temperature.gpu", "mig.mode.current",
)  # fmt: skip


def facts(_out: Path, numbers: Numbers) -> None:
    """Record all facts that are known before the first measurement, without importing PyTorch."""
    numbers.measure("card", lambda: {"name": "none: a dry run"} if numbers.dry_run else _card(), 0)
    numbers.measure("versions", _versions, 0)
    numbers.measure("machine", _machine, 0)
    numbers.measure("source", _source, 0)


def _versions() -> dict[str, Any]:
    expected = [*carried(), *machine_has()]
    versions = {name: _version(name) for name in expected}
    return {
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
        "lacking": [name for name, version in versions.items() if not version],
        # Triton compiles its launcher at run time with gcc and these files.
        "python_headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "tools": {tool: shutil.which(tool) is not None for tool in _TOOLS},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def _source() -> dict[str, Any]:
    commit = _said("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    # Identifies the commit of a copy without a repository: `LC_ALL=C; cat kernels/gpu/*.py | sha256sum`.
    kernels = sha256(b"".join(file.read_bytes() for file in sorted((ROOT / "kernels" / "gpu").glob("*.py"))))
    return {
        "commit": commit,
        "kernels_gpu_sha256": kernels.hexdigest(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _card() -> dict[str, Any]:
    """Return the driver's facts about the first GPU."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0")
    if said is None:
        raise OSError("nvidia-smi is missing or fails")
    return dict(zip(_ASKED, said.split(", "), strict=True))


def _said(*command: str) -> str | None:
    """Return the output of a command, or None if it is missing or fails, as git does without a repository."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
