"""The neighbours of all pins of a graph, in files of a range of pins each: the same for any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from ranker.data.embeddings import content_digest
from ranker.embedding.graph.graph import open_graph
from ranker.embedding.graph.parts import Parts, open_parts, write_part
from ranker.embedding.graph.walks import WalkSettings, neighbours_of
from ranker.errors import DatasetError

#: Version of the walks. Raise it when the same graph and settings would give other neighbours.
_VERSION = 1
_KIND, _COMMAND = "neighbours", "pinrank embed walks"
#: The columns: uint64, list of uint64, list of float32.
PIN, NEIGHBOURS, WEIGHTS = "pin_id", "neighbours", "weights"


def graph_folder(folder: Path) -> Path:
    """Return where the graph of a folder of neighbours is."""
    return folder / "graph"


def open_neighbours(folder: Path) -> Parts:
    """Open the neighbours in a folder. Raises DatasetError if there are none, or not all."""
    return open_parts(folder, _KIND, _COMMAND)


def walk_settings_in(files: Parts) -> WalkSettings:
    """Return how neighbours were found. Raises DatasetError if their folder does not say."""
    try:
        return WalkSettings(**json.loads((files.folder / f"{_KIND}.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{files.folder} holds no {_KIND} ({error}); make them with `{_COMMAND}`") from error


#: Calls a function for each file, anywhere and in any order, with its path and the positions of its first pin and after
#: its last one. Yields the path of each file that is complete.
Engine = Callable[[Callable[[Path, int, int], Path], Mapping[Path, tuple[int, int]]], Iterator[Path]]
#: uint64[N] pins; int64[N + 1] splits; uint64[K] neighbours, a pin's nearest first; float32[K] weights.
Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def read_neighbours(files: Parts, paths: Iterable[Path] | None = None) -> Iterator[Batch]:
    """Yield the neighbours of some pins at a time, in ascending order of the pins.

    Args:
        files: the files.
        paths: those to read; None for all.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    for batch in files.read([PIN, NEIGHBOURS, WEIGHTS], paths):
        lists = batch.column(NEIGHBOURS)
        splits = lists.offsets.to_numpy().astype(np.int64)
        found, weights = (column.flatten().to_numpy() for column in (lists, batch.column(WEIGHTS)))
        yield batch.column(PIN).to_numpy(), splits - splits[0], found, weights


def make_neighbours(
    folder: Path,
    settings: WalkSettings,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    engine: Engine | None = None,
) -> Parts:
    """Walk over the graph in `graph_folder(folder)`, and write the files that are missing.

    Args:
        folder: where the files go.
        settings: how to walk.
        processes: how many processes walk.
        progress: called with the number of pins whose neighbours are written, and how many there are.
        engine: where the walks are made instead, such as a cluster.

    Raises:
        SettingError: the folder has files of other settings or of another graph.
        DatasetError: there is no graph.
    """
    graph = open_graph(graph_folder(folder))
    content = content_digest(_KIND, _VERSION, graph.content, asdict(settings))
    made = Parts(folder, _KIND, _COMMAND, content, len(graph.pin_ids), graph.until_ms)
    ranges = made.ranges
    missing = {path: ranges[path] for path in made.begin({"settings": asdict(settings)})}
    done = made.pins - sum(stop - first for first, stop in missing.values())
    progress(done, made.pins)
    run = engine or partial(_in_processes, processes)
    for path in run(partial(_write, folder, settings), missing):
        first, stop = ranges[path]
        done += stop - first
        progress(done, made.pins)
    return made


def _in_processes(
    processes: int, write: Callable[[Path, int, int], Path], files: Mapping[Path, tuple[int, int]]
) -> Iterator[Path]:
    """Write files in this process, or in several; this is an `Engine`, once it knows how many."""
    if processes == 1 or len(files) < 2:
        for path, pins in files.items():
            yield write(path, *pins)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(write, path, *pins) for path, pins in files.items()]
        try:
            for one in as_completed(waiting):
                yield one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write(folder: Path, settings: WalkSettings, path: Path, first: int, stop: int) -> Path:
    graph = open_graph(graph_folder(folder))
    found = neighbours_of(graph, np.arange(first, stop), settings)
    splits = pa.array(found.splits.astype(np.int32))
    columns = {
        PIN: pa.array(graph.pin_ids[first:stop]),
        NEIGHBOURS: pa.ListArray.from_arrays(splits, pa.array(graph.pin_ids[found.pins])),
        WEIGHTS: pa.ListArray.from_arrays(splits, pa.array(found.weights)),
    }
    return write_part(path, iter([pa.table(columns)]))
