"""Where a result comes from: the machine, the commit, and how much of the measured code has changed since."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from kernels.encoder import instruction_sets

ROOT = Path(__file__).parent.parent

_PACKAGES = ("grpcio", "lmdb", "numexpr", "numpy", "onnxruntime", "openvino", "protobuf", "torch", "uvloop")
_DIRTY = "-dirty"
#: Benchmarks write here themselves, one after the other.
_RESULTS = ":!bench/results"


def machine() -> dict[str, Any]:
    """Describe hardware and software that the numbers depend on, without names or paths of the machine."""
    cpu = _cpu_fields()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family_model_stepping": "-".join(cpu.get(field, "?") for field in ("cpu family", "model", "stepping")),
        "instructions": instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_core": int(cpu.get("siblings", 1)) // max(1, int(cpu.get("cpu cores", 1))),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {package: metadata.version(package) for package in _PACKAGES},
        "commit": _commit(),
    }


def instructions() -> str:
    """Return the widest instruction set that the native library uses here; `none` where it is not built."""
    return (instruction_sets() or ("none",))[-1]


def _cpu_fields() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo, or {} if there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit(root: Path = ROOT) -> str | None:
    """Return the commit of the sources, marked if tracked files have changed since. Return None without git."""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", _RESULTS)
    return f"{commit}{_DIRTY if changed else ''}" if commit else None


def commits_since(commit: str, paths: Sequence[str], root: Path = ROOT) -> int | None:
    """Count the commits after `commit` that changed any of `paths`.

    Returns:
        The number; None where it is unknown: no git, or a history without this commit.
    """
    counted = _git(root, "rev-list", "--count", f"{commit}..HEAD", "--", *paths)
    return int(counted) if counted else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance_table(
    results: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Sequence[str]], root: Path = ROOT
) -> Table:
    """Show where and when each benchmark was measured, and whether its parts have changed since.

    Args:
        results: `date` and `machine` of each benchmark.
        parts: the paths that each benchmark measures.
        root: the repository.
    """
    table = Table(
        "benchmark", "processor", "date", "commit", "its code since", title="measured on", title_justify="left"
    )
    for name, content in results.items():
        about = content.get("machine", {})
        commit = about.get("commit") or ""
        processor = " ".join([about.get("cpu", "unknown"), about.get("instructions", "")]).strip()
        date = content.get("date", "unknown")[:10]
        table.add_row(name, processor, date, commit or "unknown", _since(commit, parts[name], root))
    return table


def _since(commit: str, paths: Sequence[str], root: Path) -> str:
    clean = commit.removesuffix(_DIRTY)
    count = commits_since(clean, paths, root) if clean and paths else None
    if count is None:
        changed = "unknown"
    elif count:
        changed = f"{count} commit{'s' if count > 1 else ''}"
    else:
        changed = "unchanged"
    return f"{changed}; measured on a dirty tree" if clean != commit else changed
