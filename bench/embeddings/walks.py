"""Time `pinrank embed walks` on a large graph, and take its memory on graphs of more and more edges.

The graph is drawn: its contexts hold pins of a popularity that falls as a power law. A Parquet file of edges is written
first, and does not count. Memory is what the command's processes hold together, with shared pages divided among them
(Pss); what the memory maps of the graph take of it can be reclaimed by the system, and is told apart.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.features.synthetic import power_law
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.test_bed import SEED

_LOOK_S = 0.25
_BATCH = 1_000_000
#: What one machine of two cores should do with a graph of this size.
_MINUTES_MAX, _GB_MAX = 10.0, 2.0


@dataclass(frozen=True, slots=True)
class WalksPlan:
    pins: int = 1_000_000
    contexts: int = 300_000
    edges: int = 10_000_000
    walks: int = 200
    #: Graphs whose memory is taken, with few pins and walks.
    growing: tuple[int, ...] = (5_000_000, 20_000_000, 40_000_000)
    growing_pins: int = 50_000
    growing_walks: int = 4


QUICK = WalksPlan(
    pins=2_000, contexts=600, edges=20_000, walks=20, growing=(10_000, 20_000), growing_pins=500, growing_walks=2
)


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the command fails."""
    plan = QUICK if quick else WalksPlan()
    raw: Raw = {"pins": plan.pins, "contexts": plan.contexts, "edges": plan.edges, "walks": plan.walks}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        folder = Path(temporary)
        raw["whole"] = _walked(folder, plan.pins, plan.contexts, plan.edges, plan.walks)
        yield raw
        raw["growing"] = []
        for edges in plan.growing:
            raw["growing"].append(_walked(folder, plan.growing_pins, plan.growing_pins, edges, plan.growing_walks))
            yield raw


def _walked(folder: Path, pins: int, contexts: int, edges: int, walks: int) -> dict[str, Any]:
    """Walk over a drawn graph, and return how long it took and what it held at most."""
    path, out = folder / "edges.parquet", folder / f"out-{edges}-{pins}"
    _draw(path, pins, contexts, edges)
    command = [
        sys.executable, "-c", "from server.cli.main import app; app()",
        "embed", "walks", str(path), "--out", str(out), "--walks", str(walks),
    ]  # fmt: skip
    begun_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        peaks = _Peaks(process.pid)
        _, said = process.communicate()
        peaks.end()
    elapsed_s = time.perf_counter() - begun_s
    if process.returncode:
        raise BenchmarkError(f"pinrank embed walks ended with {process.returncode}:\n{said[-2000:]}")
    sizes = [one.stat().st_size for one in (out / "graph").iterdir()]
    return {
        "edges": edges, "seconds": elapsed_s, "peak_bytes": peaks.all_bytes, "peak_own_bytes": peaks.own_bytes,
        "graph_bytes": sum(sizes),
    }  # fmt: skip


def _draw(path: Path, pins: int, contexts: int, edges: int) -> None:
    rng = np.random.default_rng(SEED)
    popularity = power_law(pins, 0.8)
    edge_of = np.concatenate([np.arange(pins), rng.choice(pins, edges - pins, p=popularity)])  # every pin has an edge
    rng.shuffle(edge_of)
    schema = pa.schema([("context_id", pa.uint64()), ("pin_id", pa.uint64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, edges, _BATCH):
            part = edge_of[start : start + _BATCH]
            columns = [rng.integers(contexts, size=len(part)).astype(np.uint64), part.astype(np.uint64)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


class _Peaks:
    """Watches what a process and its children hold."""

    def __init__(self, pid: int) -> None:
        self.all_bytes = self.own_bytes = 0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            held = [_held(pid) for pid in _tree(self._pid)]
            self.all_bytes = max(self.all_bytes, sum(both for both, _ in held))
            self.own_bytes = max(self.own_bytes, sum(own for _, own in held))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield from _tree(int(child))


def _held(pid: int) -> tuple[int, int]:
    """Return the bytes that a process holds, and those of them that are not pages of a file."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return 0, 0
    kb = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kb["Pss"] << 10, (kb["Pss_Anon"] + kb["Pss_Shmem"]) << 10


def conclude(raw: Raw) -> Conclusion:
    whole, growing = raw["whole"], raw["growing"]
    fewest, most = growing[0], growing[-1]
    claims = (
        Claim(
            f"{raw['pins']:,} pins, {raw['edges']:,} edges, {raw['walks']} walks each",
            whole["seconds"] / 60, _MINUTES_MAX, "minutes", "at_most",
        ),
        Claim("memory of all processes, with the mapped graph", whole["peak_bytes"] / 1e9, _GB_MAX, "GB", "at_most"),
        Claim(
            f"memory without the mapped graph at {most['edges'] // fewest['edges']} times as many edges",
            most["peak_own_bytes"] / fewest["peak_own_bytes"], 1.1, "ratio", "at_most",
        ),
    )  # fmt: skip
    summary = {
        "memory without the mapped graph, MB": whole["peak_own_bytes"] / 1e6,
        "files of the graph, MB": whole["graph_bytes"] / 1e6,
    }
    for one in growing:
        summary[f"{one['edges']:,} edges: memory without the mapped graph, MB"] = one["peak_own_bytes"] / 1e6
        summary[f"{one['edges']:,} edges: files of the graph, MB"] = one["graph_bytes"] / 1e6
    return Conclusion(summary, claims)
