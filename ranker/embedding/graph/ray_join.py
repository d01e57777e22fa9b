"""The join of neighbours with their features on a Ray cluster, where no machine can hold all features.

Pins are divided into buckets by a hash. A task for each file of neighbours asks the buckets for the vectors that it
needs, each pin once; a task for each part of the features sends their vectors to the buckets; one for each bucket
answers; and one for each file looks up in its answers, and writes. Ray Data moves the rows between these tasks, and
spills to disk what does not fit into its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.graph.materialised import Join, write_neighbourhoods
from ranker.embedding.graph.neighbours import read_neighbours
from ranker.embedding.graph.parts import Parts
from ranker.embedding.graph.ray_cluster import TABLES, each, results, stage
from ranker.embedding.vector_file import SavedVectorFile, ascending

#: Files of a join. Each join reads all features; an interruption loses one join's work.
_FILES_AT_ONCE = 1 << 11
#: Vectors of a bucket, on average.
_BUCKET_VECTORS = 1 << 20
#: Columns of what is moved. Pins and vectors are bytes, as a row has many.
_BUCKET, _FILE, _SOURCE, _PINS, _VECTORS = "bucket", "file", "source", "pins", "vectors"
#: In place of the position of a file of features: the row asks.
_ASKS = -1
#: Fibonacci hashing (Knuth, "The Art of Computer Programming", 6.4): 2^64 over the golden ratio.
_GOLDEN, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all tasks of a join know.

    Attributes:
        neighbours: the neighbours.
        features: the files of features.
        files: the files to write, and those of neighbours that they are made of.
        buckets: the number of buckets.
    """

    neighbours: Parts
    features: Sequence[SavedVectorFile]
    files: list[tuple[Path, Path]]
    buckets: int


class _Row(NamedTuple):
    """What is moved: a file's question to a bucket, a part of the features for it, or its answer to a file.

    Attributes:
        bucket: the bucket.
        file: position of the file that asks; of a part of the features, the part.
        source: position of the file of features; `_ASKS` in a question.
        pins: uint64[N].
        vectors: [N, D]; of a question, none.
    """

    bucket: int
    file: int
    source: int
    pins: np.ndarray
    vectors: np.ndarray


def join_on_workers(neighbours: Parts, features: Sequence[SavedVectorFile]) -> Join:
    """Return a join for `make_neighbourhoods` whose tasks run on the cluster that is connected."""
    return partial(_join, neighbours, features)


def _join(neighbours: Parts, features: Sequence[SavedVectorFile], files: Mapping[Path, Path]) -> Iterator[Path]:
    pairs = list(files.items())
    vectors = sum(one.pins for one in features)
    for first in range(0, len(pairs), _FILES_AT_ONCE):
        chosen = pairs[first : first + _FILES_AT_ONCE]
        buckets = max(len(chosen), -(-vectors // _BUCKET_VECTORS))
        plan = _Plan(neighbours, features, chosen, buckets)
        asking = [{_SOURCE: _ASKS, "part": file} for file in range(len(chosen))]
        sending = [{_SOURCE: source, "part": part} for source, one in enumerate(features) for part in range(one.parts)]
        rows = each(asking + sending).map_batches(stage(_to_buckets, plan), **TABLES)
        answers = rows.groupby(_BUCKET, plan.buckets).map_groups(stage(_answers, plan), batch_format="pyarrow")
        written = answers.groupby(_FILE, len(chosen)).map_groups(stage(_write, plan), batch_format="pyarrow")
        for row in results(written):
            yield chosen[row[_FILE]][0]


def _to_buckets(tasks: pa.Table, plan: _Plan) -> pa.Table:
    """Return a row for each bucket: what a file of neighbours asks of it, or what a part of the features has for it."""
    return pa.concat_tables([_divided(task[_SOURCE], task["part"], plan) for task in tasks.to_pylist()])


def _divided(source: int, part: int, plan: _Plan) -> pa.Table:
    if source == _ASKS:
        pins = _needed(plan.neighbours, plan.files[part][1])
        vectors = np.zeros((len(pins), 0), np.uint8)
    else:
        pins, vectors = plan.features[source].read(part)
    bucket = ((pins * _GOLDEN) >> _HALF) % np.uint64(plan.buckets)
    order = np.argsort(bucket, kind="stable")
    found, first = np.unique(bucket[order], return_index=True)
    chosen = np.split(order, first[1:]) if len(order) else []
    return _table(
        [_Row(int(to), part, source, pins[rows], vectors[rows]) for to, rows in zip(found, chosen, strict=True)]
    )


def _needed(neighbours: Parts, source: Path) -> np.ndarray:
    """Return uint64[N], the pins of a file and their neighbours, ascending, each once."""
    return np.unique(
        np.concatenate([ids for pins, _, found, _ in read_neighbours(neighbours, [source]) for ids in (pins, found)])
    )


def _answers(bucket: pa.Table, plan: _Plan) -> pa.Table:
    """Return a row for each file that asks and each file of features, also if it has none of the pins."""
    asked = _of(bucket, _ASKS)
    pins_of = [np.frombuffer(pins, np.uint64) for pins in asked[_PINS].to_pylist()]
    (number,) = set(bucket[_BUCKET].to_pylist())
    rows = []
    for source, one in enumerate(plan.features):
        known = _vectors(bucket, source, one, one.origin.space.dtype)
        for file, pins in zip(asked[_FILE].to_pylist(), pins_of, strict=True):
            chosen = pins[np.isin(pins, known.pin_ids)]
            rows.append(_Row(number, file, source, chosen, np.asarray(known.of(chosen), np.float16)))
    return _table(rows)


def _write(answers: pa.Table, plan: _Plan) -> pa.Table:
    """Write the file whose answers these are; return its number."""
    (file,) = set(answers[_FILE].to_pylist())
    target, source = plan.files[file]
    features = [_vectors(answers, position, one, "float16") for position, one in enumerate(plan.features)]
    write_neighbourhoods(target, plan.neighbours, source, features)
    return pa.table({_FILE: pa.array([file], pa.int64())})


def _of(rows: pa.Table, source: int) -> pa.Table:
    return rows.filter(pc.equal(rows[_SOURCE], source))


def _vectors(rows: pa.Table, source: int, file: SavedVectorFile, dtype: str) -> PinEmbeddings:
    """Return all vectors that rows have of a file of features. Raises DatasetError if a pin occurs twice."""
    found = _of(rows, source)
    pins = np.frombuffer(b"".join(found[_PINS].to_pylist()), np.uint64)
    vectors = np.frombuffer(b"".join(found[_VECTORS].to_pylist()), dtype).reshape(len(pins), file.origin.space.dim)
    return ascending(file.path, pins, vectors, file.origin.space)


def _table(rows: Sequence[_Row]) -> pa.Table:
    return pa.table(
        {
            _BUCKET: pa.array([row.bucket for row in rows], pa.int64()),
            _FILE: pa.array([row.file for row in rows], pa.int64()),
            _SOURCE: pa.array([row.source for row in rows], pa.int64()),
            _PINS: pa.array([row.pins.tobytes() for row in rows], pa.large_binary()),
            _VECTORS: pa.array([row.vectors.tobytes() for row in rows], pa.large_binary()),
        }
    )
