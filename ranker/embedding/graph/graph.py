"""A bipartite graph in memory maps, in compressed sparse rows both ways: the contexts of a pin, the pins of a context.

Building it reads the edges three times and keeps only what grows with the number of nodes in memory; what grows with
the number of edges stands in the files, whose pages the system may reclaim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ranker.embedding.graph.edges import Edges
from ranker.errors import DatasetError

_ABOUT = "graph.json"
_VERSION = 1
#: The least number of ids that are gathered before they are merged with those that are known, if these are few.
_IDS_MERGED = 1 << 18


@dataclass(frozen=True, slots=True)
class Side:
    """One side's rows.

    Attributes:
        starts: int64[N + 1]; node i's neighbours are `others[starts[i]:starts[i + 1]]`.
        others: uint32[E], positions on the other side, in the order of the edges.
    """

    starts: np.ndarray
    others: np.ndarray


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph whose nodes are positions.

    Attributes:
        pin_ids: uint64[P], ascending.
        pins: the contexts of each pin.
        contexts: the pins of each context.
        content: 16 hex digits, the digest of its edges.
        until_ms: Unix time in milliseconds; all edges are of events before it. None if they have no times.
    """

    pin_ids: np.ndarray
    pins: Side
    contexts: Side
    content: str
    until_ms: int | None

    @property
    def edges(self) -> int:
        return len(self.pins.others)


def build_graph(folder: Path, edges: Edges, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Graph:
    """Write a graph into a new folder, or use the one that is there if it is of the same edges.

    Args:
        folder: where the graph is, or will be.
        edges: its edges.
        progress: called with the number of edges that were read, and how many there are to read in all passes.

    Raises:
        DatasetError: there is no edge, the edges cannot be read, or the folder holds the graph of others.
    """
    pin_ids, context_ids, count, content = _nodes(edges)
    if not count:
        raise DatasetError("there is no edge: no event, before the end of the window, says that a user liked a pin")
    if (folder / _ABOUT).exists():
        found = open_graph(folder)
        if found.content != content:
            raise DatasetError(f"{folder} holds the graph of other edges; choose another folder, or remove it")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pin_ids.npy", pin_ids)
    _write_sides(folder, edges, {"contexts": context_ids, "pins": pin_ids}, count, progress)
    about = {"version": _VERSION, "content": content, "edges": count, "until_ms": edges.until_ms}
    unfinished = folder / f".{_ABOUT}"
    unfinished.write_text(json.dumps(about))
    unfinished.replace(folder / _ABOUT)  # last, so that a graph which lacks it is not complete
    return open_graph(folder)


def _write_sides(
    folder: Path, edges: Edges, ids: dict[str, np.ndarray], count: int, progress: Callable[[int, int], None]
) -> None:
    """Write the rows of both sides: count what each node has, then put it there."""
    counts = {name: np.zeros(len(own), np.int64) for name, own in ids.items()}
    done, total = count, 3 * count
    for batch in edges.batches():
        for (name, own), ends in zip(ids.items(), batch, strict=True):
            counts[name] += np.bincount(np.searchsorted(own, ends), minlength=len(own))
        done += len(batch[0])
        progress(done, total)
    starts = {name: np.concatenate([[0], np.cumsum(held)]) for name, held in counts.items()}
    free = {name: own[:-1].copy() for name, own in starts.items()}
    others = {name: _new_map(folder / f"{name}_others.npy", count) for name in ids}
    for batch in edges.batches():
        contexts, pins = (np.searchsorted(own, ends) for own, ends in zip(ids.values(), batch, strict=True))
        _place(others["contexts"], free["contexts"], contexts, pins)
        _place(others["pins"], free["pins"], pins, contexts)
        done += len(pins)
        progress(done, total)
    for name, own in starts.items():
        np.save(folder / f"{name}_starts.npy", own)
        others[name].flush()


def open_graph(folder: Path) -> Graph:
    """Open a graph that was built. Raises DatasetError if there is none, or it is of another version."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        if about["version"] != _VERSION:
            raise DatasetError(f"{folder} holds a graph of version {about['version']}; remove it, and build it again")
        sides = {
            name: Side(*(_mapped(folder / f"{name}_{part}.npy") for part in ("starts", "others")))
            for name in ("pins", "contexts")
        }
        pin_ids = _mapped(folder / "pin_ids.npy")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DatasetError(f"{folder} holds no complete graph ({error}); remove it, and build it again") from error
    return Graph(pin_ids, sides["pins"], sides["contexts"], about["content"], about["until_ms"])


def _new_map(path: Path, count: int) -> np.memmap[Any, np.dtype[np.uint32]]:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=(count,))


def _mapped(path: Path) -> np.ndarray:
    # A plain array: selecting from NumPy's own class for maps is slower.
    return np.asarray(np.load(path, mmap_mode="r"))


def _nodes(edges: Edges) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Return the ids of pins and contexts, ascending, the number of edges, and the digest of all."""
    known = [np.zeros(0, np.uint64), np.zeros(0, np.uint64)]
    waiting: tuple[list[np.ndarray], ...] = ([], [])
    count, held = 0, 0
    digests = hashlib.sha256(), hashlib.sha256()  # one for each side, so that batches make no difference
    for contexts, pins in edges.batches():
        for digest, part in zip(digests, (contexts, pins), strict=True):
            digest.update(np.ascontiguousarray(part, "<u8").data)
        for found, ids in zip(waiting, (contexts, pins), strict=True):
            found.append(np.unique(ids))
            held += len(found[-1])
        count += len(pins)
        if held > max(_IDS_MERGED, sum(map(len, known))):  # so that all merges cost what a few large ones do
            known, waiting, held = _merged(known, waiting), ([], []), 0
    context_ids, pin_ids = _merged(known, waiting)
    for what, ids in (("pins", pin_ids), ("contexts", context_ids)):
        if len(ids) > np.iinfo(np.uint32).max:
            raise DatasetError(f"the edges have {len(ids):,} {what}; a graph has at most 2^32 of each")
    content = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()[:16]
    return pin_ids, context_ids, count, content


def _merged(known: list[np.ndarray], waiting: tuple[list[np.ndarray], ...]) -> list[np.ndarray]:
    return [np.unique(np.concatenate([ids, *more])) for ids, more in zip(known, waiting, strict=True)]


def _place(others: np.ndarray, free: np.ndarray, own: np.ndarray, other: np.ndarray) -> None:
    """Put the other ends of N edges behind those that their nodes have already, in the order of the edges."""
    order = np.argsort(own, kind="stable")
    nodes, first, counts = np.unique(own[order], return_index=True, return_counts=True)
    rank = np.arange(len(own)) - np.repeat(first, counts)
    others[np.repeat(free[nodes], counts) + rank] = other[order]
    free[nodes] += counts
