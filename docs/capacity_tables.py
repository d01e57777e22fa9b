"""The tables of docs/capacity.md, worked from the committed results of the `capacity` and `serving` benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results"

#: The example of the page.
REQUESTS_PER_S, CANDIDATES = 1_000, 500
_COLUMNS = ("core-ms a request", "of it beyond the engine's runs", "rows/s a core")
_NOT_MEASURED = "Not measured yet: `python -m bench capacity`, then `python -m docs.tables --write`."


def measured_on(results: Path = RESULTS) -> str:
    """Say where the numbers of the page are from."""
    capacity = _result("capacity", results)
    if capacity is None:
        return _NOT_MEASURED
    machine, setup = capacity["machine"], capacity["raw"]["setup"]
    return (
        f"Measured on {machine['cpu']} ({setup['instructions']}), {setup['cores']} cores, engine `{setup['engine']}` "
        f"with {setup['streams']} streams, on {capacity['date'][:10]} at commit {machine['commit'] or 'unknown'}."
    )


def by_candidates(results: Path = RESULTS) -> str:
    """Return a row for each number of candidates: CPU time and rows per second of a core."""
    capacity = _result("capacity", results)
    if capacity is None:
        return _NOT_MEASURED
    summary = capacity["summary"]
    rows = []
    for count in capacity["raw"]["rounds"][0]:
        core_ms, own_ms, rows_per_s = (summary[f"{count} candidates, {column}"] for column in _COLUMNS)
        rows.append((f"{int(count):,}", f"{core_ms:.2f}", f"{own_ms:.2f}", f"{rows_per_s:,.0f}"))
    return _table(("candidates", *_COLUMNS), rows)


def memory(results: Path = RESULTS) -> str:
    """Return the memory of a process."""
    capacity = _result("capacity", results)
    if capacity is None:
        return _NOT_MEASURED
    summary, setup = capacity["summary"], capacity["raw"]["setup"]
    rows = [
        ("of its own, after start", _mb(setup["memory_at_start"]["own_bytes"])),
        ("of its own, after the largest requests", f"{summary['memory of its own, MB']:,.0f} MB"),
        ("pages of mapped files, which processes share", f"{summary['pages of mapped files, MB']:,.0f} MB"),
        ("upper limit of its near cache (`near_cache_bytes`)", _mb(setup["near_cache_bytes"])),
    ]
    return _table(("memory of a process", "bytes"), rows)


def cores_needed(results: Path = RESULTS) -> str:
    """Work the example: cores for `REQUESTS_PER_S` requests of `CANDIDATES` candidates."""
    capacity, serving = _result("capacity", results), _result("serving", results)
    if capacity is None:
        return _NOT_MEASURED
    core_ms = capacity["summary"][f"{CANDIDATES} candidates, core-ms a request"]
    busy = REQUESTS_PER_S * core_ms / 1e3
    rows = [("at 100% of every core", f"{REQUESTS_PER_S:,} x {core_ms:.2f} core-ms / 1,000", f"{busy:.1f}")]
    share = None if serving is None else _sustainable_share(serving["summary"])
    if share:
        name = f"with 99% of the answers within {_LOOSE}"
        rows.append((name, f"{busy:.1f} / {share:.2f} of the saturated rate", f"{busy / share:.1f}"))
    return _table(("cores", "how", "result"), rows)


_LOOSE = "6x the time of one run"


def _sustainable_share(summary: Mapping[str, float | None]) -> float | None:
    """Return the rate that holds at the loose deadline, as a share of the saturated rate."""
    holds, saturated = (summary.get(f"{what}, requests/s") for what in ("goodput at the loose deadline", "saturated"))
    return holds / saturated if holds and saturated else None


def _result(name: str, results: Path) -> Any:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {
    "measured on": measured_on,
    "by candidates": by_candidates,
    "memory": memory,
    "cores needed": cores_needed,
}
