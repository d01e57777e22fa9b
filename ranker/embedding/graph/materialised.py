"""Each pin with its own features and those of its neighbours, so that what reads it needs no graph and no lookups.

Joining once, in the order of the pins, is what lets training and inference stream: a row has all that a pin's vector is
made of (the offline sampling of PinSage's successor at Pinterest).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ranker.data.embeddings import PinEmbeddings, content_digest
from ranker.embedding.graph.neighbours import NEIGHBOURS, PIN, WEIGHTS, read_neighbours
from ranker.embedding.graph.parts import Parts, open_parts, write_part
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin, latest_ms
from ranker.errors import DatasetError

_KIND, _COMMAND = "neighbourhoods", "pinrank embed materialise"
#: The columns besides those of the neighbours: a list of fixed length F of float16, and a list of float16 that holds F
#: numbers for each neighbour.
OWN, THEIRS = "features", "neighbour_features"


#: Writes each file that is a key, from the file of neighbours that is its value; yields each that is complete.
Join = Callable[[Mapping[Path, Path]], Iterator[Path]]


@dataclass(frozen=True, slots=True)
class Neighbourhoods:
    """Some pins with their neighbours.

    Attributes:
        pin_ids: uint64[N], ascending.
        features: float16[N, F], zeros for pins without features.
        splits: int64[N + 1]; pin i has the neighbours from `splits[i]` to `splits[i + 1]`.
        neighbours: uint64[K], the nearest of each pin first.
        weights: float32[K], the share of the pin's visits that was theirs.
        neighbour_features: float16[K, F].
    """

    pin_ids: np.ndarray
    features: np.ndarray
    splits: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray
    neighbour_features: np.ndarray


def open_neighbourhoods(folder: Path) -> Parts:
    """Open the neighbourhoods in a folder. Raises DatasetError if there are none, or not all."""
    return open_parts(folder, _KIND, _COMMAND)


def features_in(files: Parts) -> list[str]:
    """Return the spaces of the features of neighbourhoods. Raises DatasetError if their folder does not say."""
    try:
        found: list[str] = json.loads((files.folder / f"{_KIND}.json").read_text())["features"]
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{files.folder} holds no {_KIND} ({error}); make them with `{_COMMAND}`") from error
    return found


def read_neighbourhoods(files: Parts) -> Iterator[Neighbourhoods]:
    """Yield some pins at a time, in ascending order. Raises DatasetError if a file is missing or damaged."""
    for batch in files.read([PIN, NEIGHBOURS, WEIGHTS, OWN, THEIRS]):
        lists, own = batch.column(NEIGHBOURS), batch.column(OWN)
        width = own.type.list_size
        splits = lists.offsets.to_numpy().astype(np.int64)
        flat = (column.flatten().to_numpy() for column in (lists, batch.column(WEIGHTS), batch.column(THEIRS)))
        found, weights, theirs = flat
        yield Neighbourhoods(
            batch.column(PIN).to_numpy(),
            own.flatten().to_numpy().reshape(-1, width),
            splits - splits[0],
            found,
            weights,
            theirs.reshape(-1, width),
        )


def joined(
    pins: np.ndarray, splits: np.ndarray, found: np.ndarray, weights: np.ndarray, features: Sequence[PinEmbeddings]
) -> Neighbourhoods:
    """Return pins and neighbours with their features: the vectors of all spaces, one after the other."""

    def of(pin_ids: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(one.of(pin_ids), np.float16) for one in features], axis=1)

    return Neighbourhoods(pins, of(pins), splits, found, weights, of(found))


def materialise(
    neighbours: Parts,
    features: Sequence[SavedVectors],
    folder: Path,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Parts:
    """Write the pins with their features and those of their neighbours, in the files that are missing.

    Args:
        neighbours: the neighbours.
        features: vectors of pins, which become their features.
        folder: where the files go.
        progress: called with the number of pins that are written, and how many there are.

    Raises:
        SettingError: the folder has files of other neighbours or features.
        DatasetError: a file of neighbours is damaged, or there are no features.
    """
    origins = [one.origin for one in features]
    return make_neighbourhoods(neighbours, origins, folder, join_in_memory(neighbours, features), progress)


def join_in_memory(neighbours: Parts, features: Sequence[SavedVectors]) -> Join:
    """Return a join that looks up in features that are in memory."""
    embeddings = [one.embeddings for one in features]

    def join(files: Mapping[Path, Path]) -> Iterator[Path]:
        for target, source in files.items():
            yield write_neighbourhoods(target, neighbours, source, embeddings)

    return join


def make_neighbourhoods(
    neighbours: Parts,
    features: Sequence[VectorsOrigin],
    folder: Path,
    join: Join,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Parts:
    """Do what `materialise` does, with another join and without the features in memory; it raises the same errors.

    Args:
        neighbours: the neighbours.
        features: what the files of features say about them.
        folder: where the files go.
        join: writes those that are missing.
        progress: called with the number of pins that are written, and how many there are.
    """
    if not features:
        raise DatasetError("pins need features; pass at least one file of vectors")
    spaces = [(one.space.ref, one.revision, one.made_of) for one in features]
    content = content_digest(_KIND, neighbours.content, spaces)
    until_ms = latest_ms(neighbours.until_ms, *(one.until_ms for one in features))
    made = Parts(folder, _KIND, _COMMAND, content, neighbours.pins, until_ms)
    missing = made.begin({"features": [one.space.ref for one in features]})
    ranges = made.ranges
    done = made.pins - sum(stop - first for first, stop in map(ranges.__getitem__, missing))
    progress(done, made.pins)
    sources = dict(zip(made.paths, neighbours.paths, strict=True))
    for path in join({path: sources[path] for path in missing}):
        first, stop = ranges[path]
        done += stop - first
        progress(done, made.pins)
    return made


def write_neighbourhoods(target: Path, neighbours: Parts, source: Path, features: Sequence[PinEmbeddings]) -> Path:
    """Write one file from one of neighbours. Raises DatasetError if that is damaged."""
    return write_part(target, (_table(joined(*batch, features)) for batch in read_neighbours(neighbours, [source])))


def _table(found: Neighbourhoods) -> pa.Table:
    splits = pa.array(found.splits.astype(np.int32))
    width = found.features.shape[1]
    theirs = pa.array((found.splits * width).astype(np.int64))
    return pa.table(
        {
            PIN: pa.array(found.pin_ids),
            OWN: pa.FixedSizeListArray.from_arrays(pa.array(found.features.ravel()), width),
            NEIGHBOURS: pa.ListArray.from_arrays(splits, pa.array(found.neighbours)),
            WEIGHTS: pa.ListArray.from_arrays(splits, pa.array(found.weights)),
            THEIRS: pa.LargeListArray.from_arrays(theirs, pa.array(found.neighbour_features.ravel())),
        }
    )
