"""The contract of feature stores: values of bytes by key, read and written in batches.

A store knows nothing about groups or rows: `codec` interprets the bytes, and `fetch` decides what to read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class StoreError(Exception):
    """The feature store could not complete a call."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached or did not answer in time. A later call may succeed.

    Attributes:
        values: the values of a read that succeeded in part; None if nothing could be read.
        lost: the positions of the keys that could not be read. If `values` is None, no key could be.
    """

    def __init__(self, message: str, values: Sequence[bytes | None] | None = None, lost: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.values = values
        self.lost = lost


class StoreConfigError(StoreError):
    """The store's URL, or the store that it names, cannot be used. A retry cannot help."""


#: Maps positions of keys and their values to the values to write; None leaves a key unchanged. It is called again for
#: keys that another writer changed in the meantime.
Change = Callable[[Sequence[int], Sequence[bytes | None]], list[bytes | None]]


class Store(Protocol):
    """Holds values by key. The constructor does no I/O; `start` opens the store and `close` releases it."""

    #: Whether reads come from the memory of this process and never wait for an answer.
    local: bool

    async def start(self) -> None:
        """Open the store. Raises StoreConfigError or StoreUnavailableError."""

    async def close(self) -> None:
        """Release all resources. The store can be started again."""

    async def multi_get(self, keys: Sequence[bytes], timeout_s: float | None = None) -> Sequence[bytes | None]:
        """Return the values in the order of `keys`; a key without a value gives None.

        A store that receives all values in one buffer returns `StoredValues`, which make no object for each.

        Raises:
            StoreUnavailableError: some keys could not be read within `timeout_s` seconds. It holds the other values.
        """

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        """Write values, replacing any existing ones, and return how many. They are as durable as the store itself."""

    async def update(self, keys: Sequence[bytes], change: Change, lasts_s: float | None = None) -> None:
        """Read keys, all different, and write the values that `change` returns for them. Each key changes atomically.

        Args:
            keys: the keys.
            change: is called with the positions of keys and their values. Calls of one store never overlap.
            lasts_s: how long each written value lasts, in a store that expires values; None is for ever, also for a
                value that had an end.

        Raises:
            StoreUnavailableError: some keys may not have been written.
        """

    def scan(self) -> AsyncIterator[list[bytes]]:
        """Yield all keys in batches of thousands, in no order. A key may occur twice. Raises StoreUnavailableError."""

    async def count(self) -> int:
        """Return how many values there are, of whatever kind, in constant time. Raises StoreUnavailableError."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What one step of a sweep did.

    Attributes:
        read: how many values it looked at.
        deleted: how many of them it deleted.
        next: the key to go on with; None at the end.
    """

    read: int
    deleted: int
    next: bytes | None


@runtime_checkable
class SweptStore(Store, Protocol):
    """A store that does not expire values: its values must be looked through."""

    async def sweep(
        self, prefix: bytes, start: bytes, count: int, is_over: Callable[[bytes | memoryview], bool]
    ) -> Swept | None:
        """Delete some of the values whose time is over, in one small transaction.

        Args:
            prefix: what the keys begin with.
            start: the key to begin with.
            count: how many values to look at.
            is_over: says whether the time of a value is over. It is asked again before the value is deleted.

        Returns:
            What was done; None if another process sweeps this store.

        Raises:
            StoreUnavailableError: nothing was deleted.
        """
