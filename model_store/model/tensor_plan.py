"""The tensors of a request by one call of `kernels/native/assembly.cpp`.

A plan is compiled once per manifest. It says, for each run of adjacent fields, which bytes of which rows become which
columns of which tensor. All tensors of a request are views of one allocation, its arena.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np

from feature_client.codec import RowState
from feature_client.features import FetchedFeatures
from feature_client.groups import Embedding
from feature_client.packed_fetch import Packed
from kernels.engine import FeatureBatch, TensorSpec
from kernels.native.library import address, library
from model_store.bundle.manifest import Manifest
from model_store.bundle.tensor_sources import (
    Category,
    EmbeddingSet,
    EmbeddingVector,
    QueryVector,
    Recency,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    SetSimilarities,
    Similarities,
    Source,
    SurfaceIndex,
)
from model_store.model.recency import recency
from model_store.model.similarities import native_similarities, set_similarities

#: How numbers are stored, in the order of the enum `Stored` in assembly.cpp.
_STORED = ("float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint16", "uint32")
_LINE = 64
#: Tensors of candidates have room for a multiple of this many rows, so that the next one begins on a cache line.
_ROWS = 16
_PRESENT = int(RowState.PRESENT)
_INDEX = Struct("=q").pack_into
#: The source of the surface's index, and that of the actions; then each user group is one, and each pin group three.
_SURFACE, _ACTIONS, _FIRST_GROUP = range(3)
_CANDIDATES, _EVENTS, _QUERY = range(3)
#: As the number of a tensor's rows: as many as candidates.
_PER_CANDIDATE = -1


class _Part(ctypes.Structure):
    """The struct `Part` of assembly.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("source", "offset", "stored", "columns", "codes", "plus", "rows")),
        *((name, ctypes.c_int64) for name in ("to", "to_of_rows", "to_stride")),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class _Compared:
    """Where the tensors lie that similarities compare, as bytes of those of the request, or by candidate.

    Without a sequence, its two places mean nothing.
    """

    pin: int
    of_request: tuple[int, ...]
    dim: int
    length: int
    actions: int
    to: int

    def fill(self, request_at: int, candidates_at: int, rows: int, rounded: int) -> None:
        native = native_similarities()
        assert native is not None  # noqa: S101 - it is in the library that filled the other tensors
        native.compare(
            candidates_at + self.pin * rounded,
            *(request_at + place for place in self.of_request),
            *(rows, self.dim, self.length, self.actions),
            candidates_at + self.to * rounded,
        )


class TensorPlan:
    """Builds the tensors of one model. Immutable; any number of threads may call `batch`."""

    def __init__(self, manifest: Manifest) -> None:
        """Compile the plan.

        Raises:
            NativeLibraryError: the native library is not built.
        """
        self._fill = library().pinrank_assemble
        at, count = ctypes.c_void_p, ctypes.c_int64
        self._fill.argtypes, self._fill.restype = (at, count, at, count, at), None
        self._manifest = manifest
        self._length = manifest.sequence_length
        self._surface_index = {surface.name: i for i, surface in enumerate(manifest.surfaces)}
        needs = manifest.needs
        self._users = tuple(group.name for group in needs.user_groups)
        self._pins = tuple(group.name for group in needs.pin_groups)
        self._recencies = tuple(tensor.name for tensor in manifest.inputs if isinstance(tensor.source, Recency))
        self._queries = tuple(tensor.name for tensor in manifest.inputs if isinstance(tensor.source, QueryVector))
        sources = _FIRST_GROUP + len(self._users) + 3 * len(self._pins)
        self._pack = Struct(f"={4 * sources + 1}q").pack
        self._block_start = 8 * 4 * sources
        # Tensors of the request come first, each on a cache line. Those of the candidates follow; each begins so many
        # bytes further per candidate.
        self._request: list[tuple[str, tuple[int, ...], np.dtype[Any], int]] = []
        self._candidate: list[tuple[str, tuple[int, ...], np.dtype[Any], int]] = []
        self._request_bytes = self._row_bytes = 0
        self._places: dict[str, int] = {}
        self._dims = {spec.name: spec.shape[-1] for spec in manifest.specs if spec.shape}
        for spec in manifest.specs:
            dtype = np.dtype(spec.dtype)
            nbytes = math.prod(spec.shape) * dtype.itemsize
            if spec.side == "request":
                self._request.append((spec.name, (1, *spec.shape), dtype, self._request_bytes))
                self._places[spec.name] = self._request_bytes
                self._request_bytes += -(-nbytes // _LINE) * _LINE
            else:
                self._candidate.append((spec.name, spec.shape, dtype, self._row_bytes))
                self._places[spec.name] = self._row_bytes
                self._row_bytes += nbytes
        parts = [
            part
            for spec, tensor in zip(manifest.specs, manifest.inputs, strict=True)
            for part in self._parts(spec, tensor.source)
        ]
        self._similarities = [
            self._compared(tensor.name, tensor.source)
            for tensor in manifest.inputs
            if isinstance(tensor.source, Similarities)
        ]
        self._set_similarities = [
            (tensor.source.pin, tensor.source.set, tensor.name)
            for tensor in manifest.inputs
            if isinstance(tensor.source, SetSimilarities)
        ]
        self._program = (_Part * len(parts))(*parts)
        self._program_at = ctypes.addressof(self._program)

    def batch(self, fetched: FetchedFeatures, surface: str, query: np.ndarray | None) -> FeatureBatch:
        """Build the batch of one request, whose features `Assembler.assemble` has checked."""
        block = self._block(fetched, surface, with_query=query is None)
        return self._filled(block, fetched.candidates, query, fetched.events, fetched.read_ms)

    def packed_batch(self, packed: Packed, surface: str, query: np.ndarray | None) -> FeatureBatch:
        """Build the batch of one request whose features lie in one block, read for this model."""
        _INDEX(packed.block, packed.fetch.table_bytes, self._surface_index[surface])  # type: ignore[arg-type]
        return self._filled(packed.at, packed.candidates, query, packed.newest.events, packed.read_ms)

    def _filled(
        self, block: bytes | int, rows: int, query: np.ndarray | None, events: np.ndarray, read_ms: int
    ) -> FeatureBatch:
        """Build the batch from a block of sources, or one at this address."""
        rounded = -(-rows // _ROWS) * _ROWS
        arena = np.empty(self._request_bytes + self._row_bytes * rounded + _LINE, np.uint8)
        at = address(arena)
        start = -at % _LINE
        self._fill(self._program_at, len(self._program), block, rows, at + start)
        request = {name: np.ndarray(shape, dtype, arena, start + place) for name, shape, dtype, place in self._request}
        if query is not None:
            given = np.asarray(query, np.float32)[None]
            for name in self._queries:
                if given.shape == request[name].shape:
                    request[name][:] = given
                else:
                    request[name] = given  # no engine takes it: `FeatureBatch.check`
        for name in self._recencies:
            request[name][0] = recency(events["time_ms"], read_ms)
        start += self._request_bytes
        candidate = {
            name: np.ndarray((rows, *shape), dtype, arena, start + place * rounded)
            for name, shape, dtype, place in self._candidate
        }
        for compared in self._similarities:
            compared.fill(at + start - self._request_bytes, at + start, rows, rounded)
        for pin, held, name in self._set_similarities:
            set_similarities(candidate[pin], request[held][0], candidate[name])
        return FeatureBatch(request, candidate, np.array([0, rows], np.int32))

    def _block(self, fetched: FetchedFeatures, surface: str, *, with_query: bool) -> bytes:
        """Return the sources, as the struct `Source` of assembly.cpp, and the bytes of the short ones."""
        candidates, events, query = fetched.candidates, len(fetched.events), fetched.has_query_pin
        actions = fetched.events["action"].tobytes()
        short, place = [b"", actions], self._block_start + 8
        sources = [self._block_start, 1, 0, 1, place, 1, 1, events]
        place += len(actions)
        for name in self._users:
            row = fetched.user[name].rows.tobytes()
            short.append(row)
            sources += (place, 1, 0, 1)
            place += len(row)
        for name in self._pins:
            pins = fetched.pins[name]
            at, (stride,) = pins.address, pins.rows.strides
            asked = with_query and query and int(pins.states[-1]) == _PRESENT
            sources += (at, 0, stride, candidates)
            sources += (at + candidates * stride, 0, stride, events)
            sources += (at + (candidates + events) * stride, 0, stride, asked)
        short[0] = self._pack(*sources, self._surface_index[surface])
        return b"".join(short)

    def _compared(self, tensor: str, source: Similarities) -> _Compared:
        sequence, actions = source.sequence or source.user, source.actions or source.user
        return _Compared(
            self._places[source.pin],
            tuple(self._places[name] for name in (source.user, source.query, sequence, actions)),
            self._dims[source.pin],
            self._length if source.sequence is not None else 0,
            len(self._manifest.sequence.actions) if self._manifest.sequence is not None else 0,
            self._places[tensor],
        )

    def _parts(self, spec: TensorSpec, source: Source) -> Iterator[_Part]:
        match source:
            case Scalars(group=group, fields=fields):
                yield from self._fields(spec, group, fields, _CANDIDATES)
            case Category(group=group, field=field) | EmbeddingVector(group=group, field=field):
                yield from self._fields(spec, group, (field,), _CANDIDATES)
            case EmbeddingSet(group=group, fields=fields):
                yield from self._fields(spec, group, fields, _CANDIDATES)
            case SequenceEmbeddings(group=group, field=field):
                yield from self._fields(spec, group, (field,), _EVENTS)
            case QueryVector(group=group, field=field):
                yield from self._fields(spec, group, (field,), _QUERY)
            case SequenceActions():
                yield self._part(spec, self._length, source=_ACTIONS, stored="uint8", plus=1)
            case SurfaceIndex():
                yield self._part(spec, 1, source=_SURFACE, stored="int64")
            case Recency():
                return  # Python computes it
            case Similarities() | SetSimilarities():
                return  # they are computed from the other tensors

    def _fields(self, spec: TensorSpec, name: str, fields: tuple[str, ...], use: int) -> Iterator[_Part]:
        """Yield the parts of a tensor that consists of these fields, for one of the three uses of a pin group."""
        group = self._manifest.group(name)
        if group.entity == "user":
            source, rows = _FIRST_GROUP + self._users.index(name), 1
        else:
            source = _FIRST_GROUP + len(self._users) + 3 * self._pins.index(name) + use
            rows = (_PER_CANDIDATE, self._length, 1)[use]
        field, column = group.field(fields[0]), 0
        scale = field.space.scale if isinstance(field, Embedding) else 1.0
        for block in group.blocks_of(fields):
            part = self._part(spec, rows, source=source, stored=block.dtype.name, scale=scale)
            part.offset, part.columns = block.offset, block.columns
            part.to += column * np.dtype(spec.dtype).itemsize
            column += block.columns
            yield part

    def _part(self, spec: TensorSpec, rows: int, **given: Any) -> _Part:
        """Return the part that is the first column of a tensor of so many rows."""
        dtype = np.dtype(spec.dtype)
        stored, place = _STORED.index(given.pop("stored")), self._places[spec.name]
        at = {"to": place} if spec.side == "request" else {"to": self._request_bytes, "to_of_rows": place}
        return _Part(
            **{"scale": 1.0, "columns": 1} | given | at,
            stored=stored,
            codes=dtype.kind == "i",
            rows=rows,
            to_stride=math.prod(spec.shape) * dtype.itemsize // max(rows, 1),
        )
