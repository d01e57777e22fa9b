"""The user's own vectors of pins and users, such as embeddings of texts or images: Parquet files of ids and lists.

Vectors are used as they are. pinrank fits no reduction of them: a PCA would have to be kept with the version and found
again for every later state of the file, and random projections, which need no fitting, lost what the vectors knew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_client.bulk.columns import ColumnError, field_values
from feature_client.bulk.row_groups import batches
from feature_client.groups import Embedding, EmbeddingSpace
from ranker.data.atomic.described import FILE, WORDS_MAX, Column, Values, Vectors, columns_of, vectors_of
from ranker.data.atomic.identifiers import distinct_ids, misspelt
from ranker.data.problems import Problem
from ranker.errors import DatasetError

ENDING = ".parquet"
_IDS = ("item_id", "user_id")
#: Rows that are converted at a time, and the widest vectors: together they bound the memory beyond the result.
_BATCH_ROWS, _WIDTH_MAX = 8_192, 4_096
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True, slots=True)
class VectorFile:
    """A Parquet file of vectors, whose columns are known and whose rows are not read yet.

    Attributes:
        path: path of the file.
        id_column: name of the column of identifiers: strings or whole numbers.
        vector_column: name of the column of lists.
        unread: names of all other columns.
    """

    path: Path
    id_column: str
    vector_column: str
    unread: tuple[str, ...]

    def read(self, feature: Vectors) -> tuple[Vectors, list[str], np.ndarray]:
        """Return the feature with its `dim`, the identifiers, and float32[K, dim] in the order of the file.

        Raises:
            DatasetError: an identifier or a vector is missing, malformed or repeated, or the vectors are shorter than
                `dim` or too long. The message names the file, the row and the fix.

        Cost: one pass over the file; memory for the result, and for 8,192 rows as they are in the file.
        """
        tokens: list[str] = []
        parts: list[np.ndarray] = []
        width = 0
        with _named(self.path):
            parquet = pq.ParquetFile(self.path, page_checksum_verification=True)
            for batch in batches(parquet, _BATCH_ROWS, [self.id_column, self.vector_column]):
                if not len(batch):
                    continue
                lists = batch.column(self.vector_column)
                if not parts:
                    width = self._width(lists)
                    feature = self._resolved(feature, width)
                numbers = self._numbers(lists, width, len(tokens))
                tokens += self._tokens(batch.column(self.id_column), len(tokens))
                parts.append(numbers[:, : feature.dim].copy())
        if not parts:
            raise DatasetError(f"{self.path} has no rows; write a vector for each {self.id_column}, or leave it out")
        self._check_once(tokens)
        return feature, tokens, np.concatenate(parts)

    def _width(self, lists: Any) -> int:
        """Return how many numbers the first vector of the file has."""
        first = lists[0].as_py()
        width = len(first or ())
        if not 1 <= width <= _WIDTH_MAX:
            fault = "is missing; leave out the row" if first is None else f"has {width:,} numbers; shorten all vectors"
            raise self._fault(0, f"the vector {fault}: vectors have 1 to {_WIDTH_MAX:,} numbers")
        return width

    def _resolved(self, feature: Vectors, width: int) -> Vectors:
        """Return the feature with the number of numbers that count."""
        if (feature.dim or 1) > width:
            raise DatasetError(
                f"{self.path} has vectors of {width} numbers, fewer than dim = {feature.dim} of {FILE}; leave out dim"
            )
        if feature.dim is None and width > WORDS_MAX:
            raise DatasetError(
                f"{self.path} has vectors of {width:,} numbers, and at most {WORDS_MAX} become features; reduce "
                f"them, for example by a PCA, or set dim in {FILE} if their first numbers say most"
            )
        return Vectors(vectors=feature.vectors, dim=feature.dim or width)

    def _numbers(self, lists: Any, width: int, start: int) -> np.ndarray:
        """Return float32[N, W] of lists, of which the first is row `start` of the file."""
        space = EmbeddingSpace(name="own", version=1, dim=width, dtype="float32")
        try:
            return field_values(Embedding(name="own", space=space), lists)
        except ColumnError as error:
            if error.row is None:
                raise DatasetError(f"{self.path}, column {self.vector_column!r} {error.reason}") from error
            held = lists[error.row].as_py()
            if held is not None and len(held) != width:
                reason = f"the vector has {len(held):,} numbers, the first one has {width}; write vectors of one model"
            elif held is None:
                reason = "the vector is missing; leave out the row: a missing vector counts as zeros"
            else:
                value = "a missing number" if error.value is None else f"{error.value!r}, which"
                reason = f"the vector holds {value}" + ("" if error.value is None else f" {error.reason}")
                reason += "; correct it, or leave out the row"
            raise self._fault(start + error.row, reason) from error

    def _tokens(self, column: Any, start: int) -> list[str]:
        column = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        tokens: list[str | None] = column.cast(pa.string()).to_pylist()
        for row, token in enumerate(tokens):
            wrong = "is missing; remove the row, or fill it in" if token is None else misspelt(token)
            if wrong is not None:
                shown = "" if token is None else f" {token!r}"
                raise self._fault(start + row, f"the identifier{shown} in column {self.id_column!r} {wrong}")
        return [token for token in tokens if token is not None]

    def _check_once(self, tokens: list[str]) -> None:
        row_of: dict[str, int] = {}
        for row, token in enumerate(tokens):
            if row_of.setdefault(token, row) != row:
                raise self._fault(row, f"{token!r} has a vector already in row {row_of[token]}; keep one of the two")

    def _fault(self, row: int, message: str) -> DatasetError:
        return DatasetError(f"{self.path}, row {row} (the first is 0): {message}")


def open_vectors(path: Path, what: str | None = None) -> VectorFile:
    """Find the columns of identifiers and vectors in a file.

    Identifiers are in the column `item_id` or `user_id`, or else in the only one of strings or whole numbers. Vectors
    are in the column `vector`, or else in the only one of lists of numbers.

    Args:
        path: path of the file.
        what: `item` or `user`; None if it is not known of which of them the file has vectors.

    Raises:
        DatasetError: the file does not exist, is no Parquet file, or does not tell which columns are meant.
    """
    if path.is_dir():
        raise DatasetError(f"{path} is a folder; write its Parquet files as one file")
    if not path.exists():
        raise DatasetError(f"{FILE} reads the vectors {path.name}, but {path} does not exist")
    with _named(path):
        schema = pq.read_schema(path)
    names = [f"{what}_id"] if what else list(_IDS)
    # What has the other side's name is surely not meant.
    ids = [field.name for field in schema if _is_id(field.type) and field.name not in {*_IDS} - {*names}]
    lists = [field.name for field in schema if _is_vector(field.type)]
    id_column = _chosen(path, schema, "identifiers (strings or whole numbers)", names, ids)
    vector_column = _chosen(path, schema, "vectors (lists of numbers)", ["vector"], lists)
    unread = tuple(name for name in schema.names if name not in {id_column, vector_column})
    return VectorFile(path, id_column, vector_column, unread)


def _is_id(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_integer(kind)) or any(test(kind) for test in _TEXTS)


def _is_vector(kind: Any) -> bool:
    if not any(test(kind) for test in _LISTS):
        return False
    return bool(pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))


def _chosen(path: Path, schema: Any, what: str, names: list[str], fitting: list[str]) -> str:
    """Return the column that has one of the names, or the only one that fits by its type."""
    found = [name for name in fitting if name in names] or fitting
    if len(found) == 1:
        return found[0]
    held = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    which = "several columns could hold" if found else "no column holds"
    raise DatasetError(f"{path}: {which} {what}; name the one that does {' or '.join(names)}. The columns are {held}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the errors of the Parquet reader into a DatasetError that names the file."""
    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{path} cannot be read as a Parquet file: {reason}; write it again") from error


@dataclass(frozen=True, slots=True)
class SideFeatures:
    """The features of pins, or of users, with those of their vectors.

    Attributes:
        features: the columns and vectors; those of the latter have their dimensions.
        values: the numbers, in the order of `fields_of`.
        digests: name and SHA-256 of each file of vectors.
        unread: its columns that are not used, by file.
        problems: what is suspicious about them.
    """

    features: tuple[Column | Vectors, ...]
    values: Values
    digests: tuple[str, ...]
    unread: dict[str, tuple[str, ...]]
    problems: tuple[Problem, ...]


def with_vectors(
    folder: Path, what: str, features: Sequence[Column | Vectors], listed: Values, known: Sequence[str]
) -> SideFeatures:
    """Read the files of vectors that `features.toml` names, and put their numbers beside those of the columns.

    Args:
        folder: folder of the dataset.
        what: `item` or `user`.
        features: the columns and vectors of that side.
        listed: the features of the columns.
        known: the identifiers of the interactions.

    Raises:
        DatasetError: a file is missing or malformed.
    """
    blocks, problems = [listed], list[Problem]()
    digests: list[str] = []
    unread: dict[str, tuple[str, ...]] = {}
    resolved: dict[str, Vectors] = {}
    for feature in vectors_of(features):
        file = open_vectors(folder / feature.vectors, what)
        resolved[feature.vectors], tokens, numbers = file.read(feature)
        ids = distinct_ids(tokens, f"{file.path.name}: {what}")
        order = np.argsort(ids)
        blocks.append(Values(ids[order], numbers[order]))
        with file.path.open("rb") as content:
            digests.append(f"{feature.vectors} {hashlib.file_digest(content, 'sha256').hexdigest()}")
        unread[feature.vectors] = file.unread
        problems += _without_vector(file, what, tokens, known)
    own = tuple(resolved[f.vectors] if isinstance(f, Vectors) else f for f in features)
    _check_width(what, own)
    return SideFeatures(own, Values.joined(blocks), tuple(digests), unread, tuple(problems))


def _check_width(what: str, features: Sequence[Column | Vectors]) -> None:
    words = sum(len(column.words or ()) for column in columns_of(features))
    dims = sum(vectors.dim or 0 for vectors in vectors_of(features))
    if dims and words + dims > WORDS_MAX:
        raise DatasetError(
            f"{FILE} names {words} words and {dims} numbers of vectors of {what}s, more than {WORDS_MAX} together; "
            "name fewer words, or set a smaller dim"
        )


def _without_vector(file: VectorFile, what: str, tokens: list[str], known: Sequence[str]) -> Iterator[Problem]:
    held = set(tokens)
    without = [token for token in known if token not in held]
    if not without:
        return
    if len(without) == len(known):
        yield Problem(
            "warning",
            f"{file.path.name} has no {what} of the interactions: it has {tokens[0]!r}, they have {known[0]!r}",
            "write identifiers in the same way in both files",
        )
    else:
        yield Problem(
            "warning",
            f"{file.path.name}: {len(without):,} of the {len(known):,} {what}s of the interactions have no vector, "
            f"such as {without[0]!r}; all numbers of theirs are 0",
            "add their vectors, if there are any",
        )


def unnamed_vectors(folder: Path, features: Sequence[Column | Vectors]) -> Iterator[Problem]:
    """Yield a problem for each Parquet file of a folder that none of its features name."""
    named = {feature.vectors for feature in vectors_of(features)}
    for path in sorted(folder.glob(f"*{ENDING}")):
        if path.name not in named:
            yield Problem(
                "warning",
                f"{path.name} is not used, because {FILE} does not name it",
                f"name it as vectors in {FILE}, which `pinrank data check --propose` writes if there is none; or move "
                "it to another folder",
            )
