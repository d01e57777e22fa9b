"""Edges for the tests of graphs: a list, in batches of a given size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ranker.embedding.graph.edges import Batch
from ranker.embedding.graph.graph import Graph, build_graph


@dataclass(frozen=True)
class EdgeList:
    edges: list[tuple[int, int]]
    per_batch: int = 3
    until_ms: int | None = None

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.edges), self.per_batch):
            contexts, pins = zip(*self.edges[start : start + self.per_batch], strict=True)
            yield np.array(contexts, np.uint64), np.array(pins, np.uint64)


def random_edges(seed: int, contexts: int, pins: int, count: int) -> EdgeList:
    rng = np.random.default_rng(seed)
    # Every pin has an edge, so that positions and ids can be compared.
    held = [(int(rng.integers(contexts)), pin) for pin in range(pins)]
    held += list(zip(rng.integers(contexts, size=count).tolist(), rng.integers(pins, size=count).tolist(), strict=True))
    return EdgeList(held, per_batch=1_000)


def graph_of(folder: Path, edges: EdgeList) -> Graph:
    return build_graph(folder / "graph", edges)
