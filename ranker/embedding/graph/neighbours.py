"""The neighbours of all pins of a graph, in Parquet files of a range of pins each.

A file appears when it is complete. A run that was interrupted goes on with the files that are missing, and any number
of processes makes the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ranker.embedding.graph.graph import Graph, open_graph
from ranker.embedding.graph.walks import WalkSettings, neighbours_of
from ranker.errors import DatasetError, SettingError

_ABOUT = "walks.json"
#: Version of the walks. Raise it when the same graph and settings would give other neighbours.
_VERSION = 1
_GRAPH = "graph"
#: Pins of a file.
PINS_PER_FILE = 1 << 15
#: The columns: uint64, list of uint64, list of float32.
PIN, NEIGHBOURS, WEIGHTS = "pin_id", "neighbours", "weights"


@dataclass(frozen=True, slots=True)
class NeighbourFiles:
    """The files of a folder.

    Attributes:
        folder: the folder; the graph is in it, too.
        content: 16 hex digits, the digest of the graph and of how it was walked.
        pins: the number of pins.
        until_ms: Unix time in milliseconds; all edges are of events before it. None if they have no times.
    """

    folder: Path
    content: str
    pins: int
    until_ms: int | None

    @property
    def paths(self) -> list[Path]:
        """The files, in ascending order of their pins."""
        return [self.folder / f"neighbours-{first:010d}.parquet" for first in range(0, self.pins, PINS_PER_FILE)]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the neighbours of the pins of one file after the other, in ascending order of the pins.

        Yields:
            uint64[N] pins; int64[N + 1] splits; uint64[K] neighbours, a pin's nearest first; float32[K] weights.

        Raises:
            DatasetError: a file is missing or damaged.
        """
        for path in self.paths:
            try:
                table = pq.read_table(path, page_checksum_verification=True).combine_chunks()
                lists = table.column(NEIGHBOURS).chunk(0)
                weights = table.column(WEIGHTS).chunk(0)
                splits = lists.offsets.to_numpy().astype(np.int64)
                pins = table.column(PIN).to_numpy()
            except (OSError, KeyError, pa.ArrowException) as error:
                raise DatasetError(f"{path} cannot be read: {error}; run `pinrank embed walks` again") from error
            yield pins, splits - splits[0], lists.flatten().to_numpy(), weights.flatten().to_numpy()


def graph_folder(folder: Path) -> Path:
    """Return where the graph of a folder of neighbours is."""
    return folder / _GRAPH


def open_neighbours(folder: Path) -> NeighbourFiles:
    """Open the neighbours in a folder. Raises DatasetError if there are none, or not all."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        found = NeighbourFiles(folder, about["content"], about["pins"], about["until_ms"])
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{folder} holds no neighbours ({error}); make them with `pinrank embed walks`") from error
    missing = [path for path in found.paths if not path.exists()]
    if missing:
        raise DatasetError(
            f"{folder} lacks {len(missing)} of {len(found.paths)} files of neighbours; run `pinrank embed walks` "
            "again, which makes only those"
        )
    return found


def make_neighbours(
    folder: Path,
    settings: WalkSettings,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> NeighbourFiles:
    """Walk over the graph in `graph_folder(folder)`, and write the files that are missing.

    Args:
        folder: where the files go.
        settings: how to walk.
        processes: how many processes walk.
        progress: called with the number of pins whose neighbours are written, and how many there are.

    Raises:
        SettingError: the folder has files of other settings or of another graph.
        DatasetError: there is no graph.
    """
    graph = open_graph(graph_folder(folder))
    made = NeighbourFiles(folder, _content(graph, settings), len(graph.pin_ids), graph.until_ms)
    _begin(made, settings)
    firsts = dict(zip(made.paths, range(0, made.pins, PINS_PER_FILE), strict=True))
    missing = [path for path in made.paths if not path.exists()]
    done = made.pins - sum(_pins_of(firsts[path], made.pins) for path in missing)
    progress(done, made.pins)
    for path in _written(folder, settings, [(path, firsts[path]) for path in missing], processes):
        done += _pins_of(firsts[path], made.pins)
        progress(done, made.pins)
    return made


def _content(graph: Graph, settings: WalkSettings) -> str:
    made_of = json.dumps([_VERSION, graph.content, asdict(settings)], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _begin(made: NeighbourFiles, settings: WalkSettings) -> None:
    """Say of which walks a folder will have the files, or check that it has begun with the same."""
    path = made.folder / _ABOUT
    if path.exists():
        if json.loads(path.read_text())["content"] != made.content:
            raise SettingError(
                f"{made.folder} has neighbours of other settings or edges; choose another folder, or remove it"
            )
        return
    unfinished = made.folder / f".{_ABOUT}"
    about = {"content": made.content, "pins": made.pins, "until_ms": made.until_ms, "settings": asdict(settings)}
    unfinished.write_text(json.dumps(about))
    unfinished.replace(path)


def _pins_of(first: int, pins: int) -> int:
    return min(PINS_PER_FILE, pins - first)


def _written(folder: Path, settings: WalkSettings, files: list[tuple[Path, int]], processes: int) -> Iterator[Path]:
    """Write files, and yield each that is complete."""
    if processes == 1 or len(files) < 2:
        for path, first in files:
            yield _write(folder, settings, path, first)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_write, folder, settings, path, first) for path, first in files]
        try:
            for one in as_completed(waiting):
                yield one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write(folder: Path, settings: WalkSettings, path: Path, first: int) -> Path:
    graph = open_graph(graph_folder(folder))
    stop = first + _pins_of(first, len(graph.pin_ids))
    found = neighbours_of(graph, first, stop, settings)
    splits = pa.array(found.splits.astype(np.int32))
    table = pa.table(
        {
            PIN: pa.array(graph.pin_ids[first:stop]),
            NEIGHBOURS: pa.ListArray.from_arrays(splits, pa.array(graph.pin_ids[found.pins])),
            WEIGHTS: pa.ListArray.from_arrays(splits, pa.array(found.weights)),
        }
    )
    unfinished = path.with_name(f".{path.name}")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path)
    return path
