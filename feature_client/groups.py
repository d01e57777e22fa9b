"""Feature groups: named and versioned descriptions of fixed-width rows and of action sequences.

A group's fingerprint covers everything that determines what its bytes mean. A reader therefore recognises a value that
was written for another version, field layout or embedding space before it interprets the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from feature_client.values.keys import KeyRun
from feature_client.values.native_values import Check, RowLayout

FINGERPRINT_BYTES = 8
#: Numbers of a vector at most.
DIM_MAX = 4096

_NAME = r"^[a-z][a-z0-9_]*$"
Name = Annotated[str, Field(pattern=_NAME, max_length=40)]
Version = Annotated[int, Field(ge=1, le=999_999)]


class Frozen(BaseModel):
    """An immutable value that is read from a file or a store. Unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy without what was computed of the original (cached properties): the copy may differ in it."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(copied).model_fields.keys():
            del copied.__dict__[name]
        return copied


class EmbeddingSpace(Frozen):
    """The vector space of an embedding. Only vectors of the same space can be compared.

    A stored number `x` represents `x * scale`. An `int8` space needs a scale; a float space keeps the default of 1.

    `content` tells trainings apart that share a name: the first 16 hex digits of a digest of what produced the space
    (data, code, seed, parameters). It is empty for spaces whose producer has no such digest. These keep the fingerprint
    that they had before there was a `content`, because descriptions leave it out if it is empty.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=60)]
    version: Version
    dim: Annotated[int, Field(ge=1, le=DIM_MAX)]
    dtype: Literal["float32", "float16", "int8"] = "float16"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    content: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""

    @property
    def ref(self) -> str:
        """`name@version`, and `+content` if there is any."""
        return f"{self.name}@{self.version}{self.content and f'+{self.content}'}"

    @model_serializer(mode="wrap")
    def _without_empty_content(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if not self.content:
            fields.pop("content", None)
        return fields


class Scalar(Frozen):
    """One number. `default` replaces it if the row is missing."""

    kind: Literal["scalar"] = "scalar"
    name: Name
    dtype: Literal["float32", "float64", "int32", "int64"] = "float32"
    default: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _default_fits(self) -> Scalar:
        if self.dtype.startswith("int"):
            limits = np.iinfo(self.dtype)
            fits = self.default.is_integer() and limits.min <= self.default <= limits.max
        else:
            fits = abs(self.default) <= float(np.finfo(self.dtype).max)
        if not fits:
            raise ValueError(f"field {self.name!r}: default {self.default} is not a valid {self.dtype}")
        return self


class Categorical(Frozen):
    """One of `cardinality` codes, from 0 to `cardinality - 1`."""

    kind: Literal["categorical"] = "categorical"
    name: Name
    cardinality: Annotated[int, Field(ge=2, le=2**31)]
    default: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _default_is_a_code(self) -> Categorical:
        if self.default >= self.cardinality:
            raise ValueError(f"field {self.name!r}: default {self.default} is not a code below {self.cardinality}")
        return self

    @property
    def dtype(self) -> str:
        return np.min_scalar_type(self.cardinality - 1).name


class Embedding(Frozen):
    """A vector of an embedding space. Zeros replace it if the row is missing."""

    kind: Literal["embedding"] = "embedding"
    name: Name
    space: EmbeddingSpace


GroupField = Annotated[Scalar | Categorical | Embedding, Field(discriminator="kind")]


class _StoredGroup(Frozen):
    """A description, with a fingerprint, of values that are stored under one key per entity."""

    name: Name
    version: Version

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @cached_property
    def fingerprint(self) -> bytes:
        """The first 8 bytes of the SHA-256 digest of this description's canonical JSON."""
        canonical = json.dumps(self._identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).digest()[:FINGERPRINT_BYTES]

    def _identity(self) -> dict[str, Any]:
        """Return everything that determines what the stored bytes mean."""
        return self.model_dump(mode="json")

    def keys(self, entity_ids: np.ndarray) -> list[bytes]:
        """Build the store keys of entities: `name@version:`, then the id as 8 big-endian bytes.

        Args:
            entity_ids: uint64[N].

        Cost: NumPy builds all keys; no Python code runs per id.
        """
        return KeyRun(self.key_prefix, entity_ids).keys()

    def key(self, entity_id: int) -> bytes:
        """Build the store key of one entity."""
        return self.key_prefix + entity_id.to_bytes(8, "big")

    @cached_property
    def key_prefix(self) -> bytes:
        """What all keys of the group begin with."""
        return f"{self.ref}:".encode()


@dataclass(frozen=True, slots=True)
class FloatBlock:
    """Adjacent fields of one float type in a row. Reading them together costs as much as reading one.

    Attributes:
        offset: the number of bytes before the block.
        dtype: the type of each number.
        columns: how many numbers the block holds.
        row_dtype: a row of full length in which only the block is visible.
    """

    offset: int
    dtype: np.dtype[np.generic]
    columns: int
    row_dtype: np.dtype[np.void]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return a view of structured[N] rows as [N, columns], without a copy."""
        return rows.view(self.row_dtype)["block"]


class FeatureGroup(_StoredGroup):
    """A fixed-width row of fields that describes one kind of entity."""

    entity: Literal["pin", "user"]
    fields: Annotated[tuple[GroupField, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct_names(self) -> FeatureGroup:
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"group {self.ref}: field names must be unique, got {sorted(names)}")
        return self

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """The packed little-endian structured dtype of one row."""
        parts: list[tuple[str, str] | tuple[str, str, tuple[int]]] = []
        for field in self.fields:
            if isinstance(field, Embedding):
                parts.append((field.name, np.dtype(field.space.dtype).newbyteorder("<").str, (field.space.dim,)))
            else:
                parts.append((field.name, np.dtype(field.dtype).newbyteorder("<").str))
        return np.dtype(parts)

    @cached_property
    def stored_dtype(self) -> np.dtype[np.void]:
        """The layout of a stored value: the fingerprint as one number, then the row."""
        return np.dtype([("fingerprint", "<u8"), ("row", self.dtype)])

    @cached_property
    def fingerprint_word(self) -> np.uint64:
        return np.uint64(int.from_bytes(self.fingerprint, "little"))

    @cached_property
    def categoricals(self) -> tuple[Categorical, ...]:
        return tuple(field for field in self.fields if isinstance(field, Categorical))

    @cached_property
    def default_row(self) -> np.void:
        """The row that represents an entity without a stored row."""
        row: np.void = np.zeros(1, self.dtype)[0]
        for field in self.fields:
            if not isinstance(field, Embedding):
                row[field.name] = field.default
        return row

    @cached_property
    def float_blocks(self) -> tuple[FloatBlock, ...]:
        """All float fields; adjacent fields of one type form one block."""
        return self.blocks_of([name for name in self.dtype.names or () if self.dtype[name].base.kind == "f"])

    def blocks_of(self, names: Sequence[str]) -> tuple[FloatBlock, ...]:
        """Group these fields into blocks: adjacent fields of one float type, in this order."""
        found: list[tuple[int, np.dtype[np.generic], int]] = []
        for name in names:
            assert self.dtype.fields is not None, "a group has fields"  # noqa: S101
            inner, offset = self.dtype.fields[name][:2]
            columns = inner.shape[0] if inner.shape else 1
            if found and found[-1][1] == inner.base:
                start, dtype, before = found[-1]
                if start + before * dtype.itemsize == offset:
                    found[-1] = (start, dtype, before + columns)
                    continue
            found.append((offset, inner.base, columns))
        return tuple(FloatBlock(*block, self._block_dtype(*block)) for block in found)

    def _block_dtype(self, offset: int, dtype: np.dtype[np.generic], columns: int) -> np.dtype[np.void]:
        formats, size = [(dtype, (columns,))], self.dtype.itemsize
        return np.dtype({"names": ["block"], "formats": formats, "offsets": [offset], "itemsize": size})

    @cached_property
    def row_layout(self) -> RowLayout:
        """The same description for the native library: the fingerprint, what makes a row possible, the default row."""
        assert self.dtype.fields is not None, "a group has fields"  # noqa: S101
        codes = [
            Check.code(self.dtype.fields[field.name][1], self.dtype[field.name].itemsize, field.cardinality)
            for field in self.categoricals
        ]
        floats = [Check.floats(block.offset, block.dtype.itemsize, block.columns) for block in self.float_blocks]
        return RowLayout(self.dtype, int(self.fingerprint_word), codes + floats, self.default_row.tobytes())

    def field(self, name: str) -> Scalar | Categorical | Embedding:
        for field in self.fields:
            if field.name == name:
                return field
        raise KeyError(f"group {self.ref} has no field {name!r}; it has {[f.name for f in self.fields]}")


class SequenceGroup(_StoredGroup):
    """The last actions of a user, oldest first. An action has a pin, a name, a surface and a time, but no embedding."""

    actions: Annotated[tuple[Name, ...], Field(min_length=1, max_length=254)]
    surfaces: Annotated[tuple[Name, ...], Field(min_length=1, max_length=254)]
    length_max: Annotated[int, Field(ge=1, le=100_000)]

    #: `action` and `surface` are positions in the vocabularies above. `time_ms` is the Unix time in milliseconds. The
    #: producer sets `event_id` so that a repeated action is recognised; 0 means that the action has no id.
    dtype: ClassVar[np.dtype[np.void]] = np.dtype(
        [("pin_id", "<u8"), ("time_ms", "<i8"), ("event_id", "<u8"), ("action", "u1"), ("surface", "u1")]
    )

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "layout": self.dtype.descr}


@dataclass(frozen=True, slots=True)
class FeatureNeeds:
    """The groups that a model reads: any number per kind of entity, and at most one sequence."""

    user_groups: tuple[FeatureGroup, ...]
    pin_groups: tuple[FeatureGroup, ...]
    sequence: SequenceGroup | None
    #: How many of the newest actions the model reads.
    sequence_length: int
