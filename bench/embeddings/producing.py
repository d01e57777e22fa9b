"""What the benchmarks of networks of pins share: neighbourhoods of a log."""

from __future__ import annotations

from pathlib import Path

from ranker.data.actions import ActionLog
from ranker.data.embeddings import DIM, svd_embeddings
from ranker.embedding.graph.edges import LogEdges
from ranker.embedding.graph.graph import Graph, build_graph
from ranker.embedding.graph.materialised import materialise
from ranker.embedding.graph.neighbours import graph_folder, make_neighbours
from ranker.embedding.graph.parts import Parts
from ranker.embedding.graph.walks import WalkSettings
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin


def svd_until(log: ActionLog, until_ms: int, seed: int, dim: int = DIM) -> SavedVectors:
    """Return an SVD's vectors of the pins in a log's events before a time."""
    svd = svd_embeddings(log, until_ms, seed, "bench", dim)
    return SavedVectors(svd, VectorsOrigin(space=svd.space, until_ms=until_ms))


def neighbourhoods_until(
    log: ActionLog, until_ms: int, folder: Path, features: SavedVectors, walks: int = 200
) -> tuple[Graph, WalkSettings, Parts]:
    """Return the graph of a log's events before a time, how it was walked, and neighbourhoods with these features."""
    graph = build_graph(graph_folder(folder / "neighbours"), LogEdges(log, until_ms))
    settings = WalkSettings(walks=walks)
    neighbours = make_neighbours(folder / "neighbours", settings)
    return graph, settings, materialise(neighbours, [features], folder / "neighbourhoods")
