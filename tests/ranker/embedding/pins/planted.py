"""A small graph with a planted taste: contexts hold pins of one group each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.graph.graph import Graph, build_graph
from ranker.embedding.graph.materialised import materialise
from ranker.embedding.graph.neighbours import graph_folder, make_neighbours
from ranker.embedding.graph.parts import Parts
from ranker.embedding.graph.walks import WalkSettings
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin
from tests.ranker.embedding.edges import EdgeList

GROUPS, PINS = 6, 60
WALKS = WalkSettings(walks=40, neighbours=5)


@dataclass(frozen=True)
class Planted:
    graph: Graph
    neighbourhoods: Parts


def edges(contexts: int = 120, seed: int = 0, more: list[tuple[int, int]] | None = None) -> EdgeList:
    """Return contexts of six pins of one group each; pin p is of group p % GROUPS, and p + 1_000 is its identifier."""
    rng = np.random.default_rng(seed)
    held = [
        (context, 1_000 + int(pin) * GROUPS + context % GROUPS)
        for context in range(contexts)
        for pin in rng.choice(PINS // GROUPS, 6, replace=False)
    ]
    return EdgeList(held + (more or []), per_batch=1_000, until_ms=77)


def features(dim: int = 4, seed: int = 1) -> SavedVectors:
    """Return random features of the pins, which say nothing of their groups."""
    space = EmbeddingSpace(name="random", version=1, dim=dim, content="00000000000000ab")
    numbers = np.random.default_rng(seed).standard_normal((PINS, dim)).astype(np.float16)
    held = PinEmbeddings(np.arange(1_000, 1_000 + PINS, dtype=np.uint64), numbers, space)
    return SavedVectors(held, VectorsOrigin(space=space, until_ms=77))


def planted(folder: Path, found: EdgeList | None = None, neighbours: int = 5) -> Planted:
    graph = build_graph(graph_folder(folder / "n"), found or edges())
    made = make_neighbours(folder / "n", replace(WALKS, neighbours=neighbours))
    return Planted(graph, materialise(made, [features()], folder / "m"))
