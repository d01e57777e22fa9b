"""Values as a store returned them: in one buffer, without an object for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

#: The size of a value that is absent.
ABSENT = -1


class StoredValues(Sequence[bytes | None]):
    """Values in one buffer. Whoever reads them as a sequence gets bytes, or None for an absent value.

    Attributes:
        buffer: the bytes of all values, and others between them.
        starts: int64[N], where each value begins in `buffer`; contiguous.
        sizes: int64[N], how many bytes it has; `ABSENT` if the store holds no value. Contiguous.
    """

    __slots__ = ("buffer", "sizes", "starts")

    def __init__(self, buffer: bytes, starts: np.ndarray, sizes: np.ndarray) -> None:
        self.buffer, self.starts, self.sizes = buffer, starts, sizes

    @classmethod
    def of(cls, values: Sequence[bytes | None]) -> StoredValues:
        """Return values that are objects of their own in one buffer. Cost: 3 us, and about 20 ns a value."""
        if isinstance(values, StoredValues):
            return values
        try:
            sizes = np.fromiter(map(len, values), np.int64, len(values))  # type: ignore[arg-type]
            buffer = b"".join(values)  # type: ignore[arg-type]
        except TypeError:  # one of them is absent
            sizes = np.array([ABSENT if value is None else len(value) for value in values], np.int64)
            buffer = b"".join([value for value in values if value is not None])
        starts = np.zeros(len(sizes), np.int64)
        if len(sizes) > 1:
            np.maximum(sizes[:-1], 0).cumsum(out=starts[1:])
        return cls(buffer, starts, sizes)

    @classmethod
    def joined(cls, parts: Sequence[StoredValues]) -> StoredValues:
        """Return the values of all parts, at least one, in order."""
        before = np.cumsum([0, *(len(part.buffer) for part in parts[:-1])])
        starts = np.concatenate([part.starts + offset for part, offset in zip(parts, before, strict=True)])
        return cls(b"".join([part.buffer for part in parts]), starts, np.concatenate([part.sizes for part in parts]))

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> bytes | None: ...
    @overload
    def __getitem__(self, index: slice) -> StoredValues: ...
    def __getitem__(self, index: int | slice) -> bytes | StoredValues | None:
        if isinstance(index, slice):
            starts, sizes = self.starts[index], self.sizes[index]
            if index.step not in (None, 1):
                starts, sizes = np.ascontiguousarray(starts), np.ascontiguousarray(sizes)
            return StoredValues(self.buffer, starts, sizes)
        return self._value(int(self.starts[index]), int(self.sizes[index]))

    def __iter__(self) -> Iterator[bytes | None]:
        return map(self._value, self.starts.tolist(), self.sizes.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _value(self, start: int, size: int) -> bytes | None:
        return None if size == ABSENT else self.buffer[start : start + size]
