"""The store contract: bytes by key, many at a time.

Stores know nothing of groups or rows; `codec` gives the bytes their meaning, `fetch` decides what to read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol


class StoreError(Exception):
    """The feature store could not do what was asked."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or did not answer in time; a later call may succeed.

    Attributes:
        values: of a read of which a part came back, these; None where nothing did.
        lost: positions of the keys that were not read; with `values` None, all.
    """

    def __init__(self, message: str, values: list[bytes | None] | None = None, lost: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.values = values
        self.lost = lost


class StoreConfigError(StoreError):
    """The store's URL or what it points to is unusable; no retry can help."""


#: From the values of some keys to the values to write in their place; None leaves a key as it is. May be called more
#: than once, for the keys that somebody else wrote in between.
Change = Callable[[Sequence[int], list[bytes | None]], list[bytes | None]]


class Store(Protocol):
    """Holds values by key. Constructors only remember; `start` opens, `close` releases."""

    #: Whether reads come from this process's memory, so that there is no answer to wait for.
    local: bool

    async def start(self) -> None:
        """Open the store. Raises StoreConfigError or StoreUnavailableError."""

    async def close(self) -> None:
        """Release everything; the store may be started again."""

    async def multi_get(self, keys: Sequence[bytes], timeout_s: float | None = None) -> list[bytes | None]:
        """Return the values in the order of `keys`, None where there is none.

        Raises:
            StoreUnavailableError: not all could be read within `timeout_s`; it holds those that were.
        """

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        """Write values, replacing what was there; return how many. As durable as the store itself."""

    async def update(self, keys: Sequence[bytes], change: Change) -> None:
        """Read distinct keys, let `change` say what to write, and write it; each key's change is atomic.

        `change` gets the positions of the keys and their values. Raises StoreUnavailableError when some keys may not
        have been written.
        """

    def scan(self) -> AsyncIterator[list[bytes]]:
        """Yield all keys, some thousands at a time, in no order; one may come twice. Raises StoreUnavailableError."""
