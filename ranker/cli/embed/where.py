"""Where walks and the join of `pinrank embed` run: on this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ranker.embedding.graph.materialised import Join
    from ranker.embedding.graph.neighbours import Engine
    from ranker.embedding.graph.parts import Parts
    from ranker.embedding.vector_file import VectorsOrigin

OnOption = Annotated[
    Literal["ray"] | None,
    typer.Option(
        "--on",
        help="[bold]ray[/]: run on the Ray cluster that RAY_ADDRESS names, or on one that is started on this machine "
        "for this command. All files must stand on a file system that every machine of the cluster sees under the same "
        "path. The result is the same, and either way goes on with what the other has begun.",
    ),
]


@contextmanager
def engine_of(on: Literal["ray"] | None, folder: Path) -> Iterator[Engine | None]:
    """Yield what makes the walks whose result goes into a folder; None for processes of this machine."""
    if on is None:
        yield None
        return
    from ranker.embedding.graph.ray_cluster import cluster, on_workers  # noqa: PLC0415

    with cluster(folder):
        yield on_workers


@contextmanager
def join_of(
    on: Literal["ray"] | None, neighbours: Parts, paths: Sequence[Path], folder: Path
) -> Iterator[tuple[list[VectorsOrigin], Join]]:
    """Yield what files of features say about them, and a join with them whose result goes into a folder."""
    from ranker.embedding.graph.materialised import join_in_memory  # noqa: PLC0415
    from ranker.embedding.vector_file import open_saved_vectors, read_vectors  # noqa: PLC0415

    if on is None:
        features = [read_vectors(path) for path in paths]
        yield [one.origin for one in features], join_in_memory(neighbours, features)
        return
    from ranker.embedding.graph.ray_cluster import cluster  # noqa: PLC0415
    from ranker.embedding.graph.ray_join import join_on_workers  # noqa: PLC0415

    files = [open_saved_vectors(path.absolute()) for path in paths]
    with cluster(folder, [neighbours.folder, *(file.path for file in files)]):
        yield [file.origin for file in files], join_on_workers(neighbours, files)
