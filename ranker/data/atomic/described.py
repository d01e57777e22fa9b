"""What a dataset's own columns and vectors say about its pins and users: the features that `features.toml` names.

A column of numbers becomes one field of the pins' or users' group, a column of words one field per word: 1 where a row
has it, and a file of vectors one field per number. Networks and baselines read them like the counts of actions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.compute as pc
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from feature_client.groups import Frozen
from ranker.data.atomic.recbole_file import AtomicFile, TextRows
from ranker.data.schema import read_toml

FILE = "features.toml"
#: Words of all columns and numbers of all vectors of one side together; each is a column of the network's input.
WORDS_MAX = 128
_NAME_MAX = 40


class Column(Frozen):
    """A column whose values become features; without words, it holds numbers."""

    column: Annotated[str, Field(min_length=1)]
    words: Annotated[tuple[str, ...], Field(min_length=1, max_length=WORDS_MAX)] | None = None

    @model_validator(mode="after")
    def _words_differ(self) -> Column:
        if self.words is not None and len(set(self.words)) < len(self.words):
            raise ValueError(f"column {self.column!r} names a word twice")
        return self


class Vectors(Frozen):
    """A Parquet file beside the data with a vector for each pin or user, whose numbers become features.

    Attributes:
        vectors: name of the file.
        dim: how many numbers of each vector count, from the first. None means all; reading fills it in.
    """

    vectors: Annotated[str, Field(min_length=1)]
    dim: Annotated[int, Field(ge=1, le=WORDS_MAX, strict=True)] | None = None

    @field_validator("vectors")
    @classmethod
    def _lies_beside_the_data(cls, name: str) -> str:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{name!r} is no name of a file beside the data; put it there, and name no folder")
        return name


def _kind(table: Any) -> str:
    """Return which class a table of `features.toml` is, so that its mistakes are those of that class."""
    given = table if isinstance(table, dict) else {"vectors": None} if isinstance(table, Vectors) else {}
    return "vectors" if "vectors" in given else "column"


Feature = Annotated[Annotated[Column, Tag("column")] | Annotated[Vectors, Tag("vectors")], Discriminator(_kind)]


class Described(Frozen):
    """The columns of `NAME.item` and of `NAME.user`, and the vectors, that become features."""

    pins: tuple[Feature, ...] = ()
    users: tuple[Feature, ...] = ()

    @model_validator(mode="after")
    def _features_differ(self) -> Described:
        for side, features in (("pins", self.pins), ("users", self.users)):
            for what, names in (
                ("column", [column.column for column in columns_of(features)]),
                ("file of vectors", [vectors.vectors for vectors in vectors_of(features)]),
            ):
                if len(set(names)) < len(names):
                    raise ValueError(f"{side}: a {what} is named twice")
            if (words := sum(len(column.words or ()) for column in columns_of(features))) > WORDS_MAX:
                raise ValueError(f"{side}: {words} words are more than {WORDS_MAX}; keep the most frequent")
        return self


def columns_of(features: Iterable[Column | Vectors]) -> tuple[Column, ...]:
    return tuple(feature for feature in features if isinstance(feature, Column))


def vectors_of(features: Iterable[Column | Vectors]) -> tuple[Vectors, ...]:
    return tuple(feature for feature in features if isinstance(feature, Vectors))


def fields_of(features: Iterable[Column | Vectors]) -> tuple[str, ...]:
    """Return the names of the fields of a group: those of columns, then those of vectors.

    Each is unique and begins with the name of its column or file.
    """
    features = tuple(features)
    ordered: tuple[Column | Vectors, ...] = (*columns_of(features), *vectors_of(features))
    found: dict[str, None] = {}
    for feature in ordered:
        base, wanted = _wanted_names(feature)
        for place, whole in enumerate(wanted):
            name = whole[:_NAME_MAX].rstrip("_")
            if name in found or name.endswith("_share"):
                # Another field has it, or it would look like the share of an action.
                name = f"{base[: _NAME_MAX - 12]}_{place}_of_{len(found)}"
            found[name] = None
    return tuple(found)


def _wanted_names(feature: Column | Vectors) -> tuple[str, list[str]]:
    if isinstance(feature, Column):
        base = _slug(feature.column)
        return base, [base] if feature.words is None else [f"{base}_{_slug(word)}" for word in feature.words]
    assert feature.dim is not None, "reading the vectors sets it"  # noqa: S101
    base = _slug(Path(feature.vectors).stem)[: _NAME_MAX - 12]
    return base, [f"{base}_{place}" for place in range(feature.dim)]


def _slug(text: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    return f"own_{name}" if name in _TAKEN or not name[:1].isalpha() else name


#: Fields that every group has.
_TAKEN = frozenset({"embedding", "log_actions", "creator_tail", "merchant", "ad"})


@dataclass(frozen=True, slots=True)
class Values:
    """The features of the entities that the files list.

    Attributes:
        ids: uint64[K], ascending.
        numbers: float32[K, F], in the order of `fields_of`.
    """

    ids: np.ndarray
    numbers: np.ndarray

    @staticmethod
    def none(fields: int = 0) -> Values:
        return Values(np.empty(0, np.uint64), np.empty((0, fields), np.float32))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Return float32[N, F] of uint64[N] entities; 0 for those that the files do not list."""
        found = np.zeros((len(ids), self.numbers.shape[1]), np.float32)
        if len(self.ids):
            place = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
            listed = self.ids[place] == ids
            found[listed] = self.numbers[place[listed]]
        return found

    def lists(self, ids: np.ndarray) -> np.ndarray:
        """Return bool[N], which of uint64[N] entities the files list."""
        return np.isin(ids, self.ids)

    @staticmethod
    def joined(blocks: Sequence[Values]) -> Values:
        """Return the features of several files side by side; 0 where one of them does not list an entity."""
        if len(blocks) == 1:
            return blocks[0]
        ids = np.unique(np.concatenate([block.ids for block in blocks]))
        return Values(ids, np.concatenate([block.of(ids) for block in blocks], axis=1))


def read_described(path: Path) -> Described:
    """Read a `features.toml`. Raises a SettingError that names every mistake."""
    return read_toml(path, Described, "features")


def check_columns(file: AtomicFile, columns: Iterable[Column]) -> None:
    """Raise DatasetError if a file lacks a column, or has it in another type."""
    for column in columns:
        if column.column not in file.kinds:
            raise file.fault(1, f"{FILE} reads column {column.column!r}, but the columns are {', '.join(file.kinds)}")
        kind = file.kinds[column.column]
        wanted = ("float",) if column.words is None else ("token", "token_seq")
        if kind not in wanted:
            fix = "name its words" if column.words is None else "leave out its words"
            raise file.fault(1, f"column {column.column!r} is a {kind}, which {FILE} cannot read so; {fix}")


def numbers_of(rows: TextRows, columns: Iterable[Column]) -> np.ndarray:
    """Return float32[N, F] of the rows of a file, in the order of `fields_of`.

    A missing number is the median of the column, and 0 if all are missing.

    Raises:
        DatasetError: a value of a column of numbers is none.
    """
    found = [np.empty((len(rows), 0), np.float32)]
    for column in columns:
        if column.words is None:
            found.append(_numbers(rows, column.column)[:, None].astype(np.float32))
        else:
            several = rows.file.kinds[column.column] == "token_seq"
            values, code = rows.encoded(column.column)
            held = [set(value.split(" ")) if several else {value} for value in values]
            has = np.array([[word in words for word in column.words] for words in held], np.float32)
            found.append(has.reshape(len(held), len(column.words))[code])
    return np.concatenate(found, axis=1)


def _numbers(rows: TextRows, name: str) -> np.ndarray:
    texts = pc.utf8_trim(rows.texts[name], " ")
    missing = np.asarray(pc.equal(texts, ""), bool)
    values = TextRows(rows.file, {name: pc.if_else(pc.equal(texts, ""), "0", texts)}).numbers(name).copy()
    if missing.any():
        values[missing] = np.median(values[~missing]) if not missing.all() else 0.0
    return values
