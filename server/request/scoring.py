"""Turns a request's logits into its ordered answer, in one call of the native library without the interpreter lock.

`kernels/native/answer.cpp` calibrates, evaluates the parties' utilities, weighs, orders and packs. Where the library is
not built, or a surface's table stays with numexpr, NumPy does the same, and gives the same bits.
"""

from __future__ import annotations

import ctypes
import struct
import time
from itertools import groupby
from typing import Protocol

import numpy as np

from feature_client.features import FetchedFeatures
from feature_client.groups import FeatureGroup
from kernels.native.library import address, library
from model_store.bundle.manifest import Manifest
from model_store.model.native_utility import types
from model_store.model.selection import select
from model_store.model.utility import UtilityTable

#: Tags of the fields of pinrank.v1.RankResponse: the number of the field times eight, plus 2 for a length.
_PIN_IDS, _UTILITIES = b"\x0a", b"\x12"
#: What stands before the arrays in `Scores`: the number of non-finite utilities, and nanoseconds.
_HEAD = struct.Struct("=qq")


class Scores:
    """One request's scores and order, in one block of memory that native code or NumPy fills.

    The arrays are views of the block, made when they are asked for. N is the number of the request's candidates.

    Attributes:
        scored: so many of the first candidates have scores; the others were trimmed.
        top: K, the number of candidates that are returned.
    """

    __slots__ = (
        "_heads",
        "_memory",
        "_order_at",
        "_packed_at",
        "_parties",
        "_probabilities_at",
        "_rows",
        "scored",
        "top",
    )

    def __init__(self, scored: int, rows: int, top_k: int, heads: int, parties: int) -> None:
        """Reserve memory for `rows` candidates, at least one, of which `top_k` are returned; 0 returns all."""
        self.scored = scored
        self.top = top = min(top_k, rows) if top_k else rows
        self._rows, self._heads, self._parties = rows, heads, parties
        # `Answer` in answer.cpp has the same layout.
        self._order_at = order_at = _HEAD.size + 8 * rows * parties
        self._probabilities_at = probabilities_at = order_at + 8 * top
        self._packed_at = packed_at = probabilities_at + 4 * rows * (heads + 1)
        # Each field has a tag and a length in base 128.
        lengths = (3 + top.bit_length() + 6) // 7 + (2 + top.bit_length() + 6) // 7
        self._memory = np.empty(packed_at + 2 + lengths + 12 * top, np.uint8)

    @property
    def address(self) -> int:
        """Where the block begins."""
        return address(self._memory)

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where `order`, `utilities`, `probabilities` and `party_utilities` begin."""
        start = self.address
        utilities_at = start + self._packed_at - 4 * self._rows
        return start + self._order_at, utilities_at, start + self._probabilities_at, start + _HEAD.size

    @property
    def non_finite(self) -> int:
        """The number of scored candidates whose utility is not finite."""
        found: int = _HEAD.unpack_from(self._memory.data)[0]
        return found

    @property
    def order_s(self) -> float:
        """The seconds that ordering and packing took."""
        found: int = _HEAD.unpack_from(self._memory.data)[1]
        return found / 1e9

    @property
    def packed(self) -> memoryview:
        """The response's fields `pin_ids` and `utilities`, serialised."""
        return self._memory.data[self._packed_at :]

    @property
    def order(self) -> np.ndarray:
        """int64[K], positions of the best candidates in the request."""
        return self._memory[self._order_at : self._probabilities_at].view(np.int64)

    @property
    def utilities(self) -> np.ndarray:
        """float32[N], in request order; NaN for candidates that were trimmed. So are the next two."""
        return self._memory[self._packed_at - 4 * self._rows : self._packed_at].view(np.float32)

    @property
    def probabilities(self) -> np.ndarray:
        """float32[N, H]."""
        end = self._packed_at - 4 * self._rows
        return self._memory[self._probabilities_at : end].view(np.float32).reshape(self._rows, self._heads)

    @property
    def party_utilities(self) -> np.ndarray:
        """float64[N, P]."""
        return self._memory[_HEAD.size : self._order_at].view(np.float64).reshape(self._rows, self._parties)

    def arrange(self, pin_ids: np.ndarray) -> None:
        """Order and pack in NumPy, once the other arrays are filled up to `scored`."""
        start_s = time.perf_counter()
        for array in (self.probabilities, self.party_utilities, self.utilities):
            array[self.scored :] = np.nan
        self._put(select(self.utilities, self.top), pin_ids)
        non_finite = self.scored - int(np.count_nonzero(np.isfinite(self.utilities)))
        _HEAD.pack_into(self._memory.data, 0, non_finite, round((time.perf_counter() - start_s) * 1e9))

    def rearrange(self, order: np.ndarray, utilities: np.ndarray, pin_ids: np.ndarray) -> None:
        """Replace order and utilities, and pack them again.

        Args:
            order: int64[K].
            utilities: float32[N].
            pin_ids: uint64[N].
        """
        self.utilities[:] = utilities
        self._put(order, pin_ids)

    def _put(self, order: np.ndarray, pin_ids: np.ndarray) -> None:
        self.order[:] = order
        self.packed[:] = _packed(_PIN_IDS, pin_ids[order]) + _packed(_UTILITIES, self.utilities[order])


def _packed(tag: bytes, values: np.ndarray) -> bytes:
    """Encode a packed repeated field of fixed-width numbers: the tag, the length as a varint, little-endian numbers."""
    left, length = values.nbytes, bytearray()
    while left > 0x7F:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return tag + length + values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


class Scoring(Protocol):
    """Scores requests of one surface with one model and utility table. Belongs to one event loop."""

    def score(self, logits: np.ndarray, fetched: FetchedFeatures, pin_ids: np.ndarray, top_k: int) -> Scores:
        """Calibrate, evaluate and order.

        Args:
            logits: float32[M, H], of the first M candidates.
            fetched: the features of M candidates.
            pin_ids: uint64[N], all candidates, 0 < M <= N.
            top_k: how many to return; 0 returns all.

        Raises:
            ValueError: the shapes do not fit each other.
        """


def scoring_of(manifest: Manifest, utility: UtilityTable, surface: str) -> Scoring:
    """Choose how requests of a surface are scored."""
    if surface in utility.native:
        return NativeScoring(manifest, utility, surface)
    return NumpyScoring(utility, surface)


class NativeScoring:
    """Scores with the native library, in one call that does not hold the interpreter lock."""

    def __init__(self, manifest: Manifest, utility: UtilityTable, surface: str) -> None:
        self._native = utility.native[surface]
        self._heads, self._parties = len(utility.heads), len(utility.surfaces[surface].parties)
        attributes = utility.attributes_of(surface)  # those of a group are adjacent
        #: Each group's name, its rows' dtype, and the attributes' offsets in a row with the numbers of their types.
        self._groups = [
            (name, manifest.group(name).dtype, [_place(manifest.group(name), a.field) for a in own])
            for name, own in groupby(attributes, lambda a: a.group)
        ]
        self._record = struct.Struct(f"={6 + 3 * len(attributes)}q")
        self._answer = library().pinrank_answer
        self._answer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]

    def score(self, logits: np.ndarray, fetched: FetchedFeatures, pin_ids: np.ndarray, top_k: int) -> Scores:
        """See `Scoring`."""
        scored, rows = len(logits), len(pin_ids)
        if logits.shape != (scored, self._heads) or not 0 < scored == fetched.candidates <= rows:
            raise ValueError(f"logits of shape {logits.shape} for {fetched.candidates} of {rows} candidates")
        logits = np.ascontiguousarray(logits, np.float32)
        pin_ids = np.ascontiguousarray(pin_ids, np.uint64)
        columns: list[int] = []
        for group, dtype, fields in self._groups:
            start, stride = _rows_at(fetched, group, dtype, scored)
            for offset, number in fields:
                columns += (start + offset, stride, number)
        scores = Scores(scored, rows, top_k, self._heads, self._parties)
        record = self._record.pack(
            address(logits), address(pin_ids), scored, rows, scores.top, scores.address, *columns
        )
        if self._answer(self._native.address, record):
            raise MemoryError(f"no memory to score {rows} candidates")
        return scores


def _rows_at(fetched: FetchedFeatures, group: str, dtype: np.dtype[np.void], count: int) -> tuple[int, int]:
    """Return the address of the candidates' rows of a group, and their distance."""
    packed_at = None if fetched.packed is None else fetched.packed.pins_at(group, dtype)
    if packed_at is not None:
        return packed_at, dtype.itemsize
    pins = fetched.pins[group]
    if pins.rows.dtype != dtype or len(pins.rows) < count:
        raise ValueError(f"{len(pins.rows)} rows of {pins.rows.dtype} for {count} rows of group {group}")
    return pins.address, pins.rows.strides[0]


def _place(group: FeatureGroup, field: str) -> tuple[int, int]:
    assert group.dtype.fields is not None, "a group has fields"  # noqa: S101
    dtype, offset = group.dtype.fields[field][:2]
    return offset, types()[dtype.name]


class NumpyScoring:
    """Scores with NumPy and numexpr: the reference, and the way without the native library."""

    def __init__(self, utility: UtilityTable, surface: str) -> None:
        self._utility = utility
        self._surface = surface

    def score(self, logits: np.ndarray, fetched: FetchedFeatures, pin_ids: np.ndarray, top_k: int) -> Scores:
        """See `Scoring`."""
        utility, surface, scored = self._utility, self._surface, len(logits)
        if logits.shape != (scored, len(utility.heads)) or not 0 < scored == fetched.candidates <= len(pin_ids):
            raise ValueError(f"logits of shape {logits.shape} for {fetched.candidates} of {len(pin_ids)} candidates")
        scores = Scores(scored, len(pin_ids), top_k, len(utility.heads), len(utility.surfaces[surface].parties))
        columns = {a.name: fetched.candidate_rows(a.group)[a.field] for a in utility.attributes}
        probabilities = utility.logistic.reference(logits)
        parties = utility.reference_utilities(surface, probabilities, columns)
        scores.probabilities[:scored], scores.party_utilities[:scored] = probabilities, parties
        scores.utilities[:scored] = utility.combine(surface, parties)
        scores.arrange(pin_ids)
        return scores
