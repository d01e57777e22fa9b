"""The store contract: bytes by key, many at a time.

Stores know nothing of groups or rows; `codec` gives the bytes their meaning, `fetcher` decides what to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class StoreError(Exception):
    """The feature store could not do what was asked."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or did not answer in time; a later call may succeed."""


class StoreConfigError(StoreError):
    """The store's URL or what it points to is unusable; no retry can help."""


class Store(Protocol):
    """Holds values by key. Constructors only remember; `start` opens, `close` releases."""

    #: Whether reads come from this process's memory, so that there is no answer to wait for.
    local: bool

    async def start(self) -> None:
        """Open the store. Raises StoreConfigError or StoreUnavailableError."""

    async def close(self) -> None:
        """Release everything; the store may be started again."""

    async def multi_get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values in the order of `keys`, None where there is none. Raises StoreUnavailableError."""

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        """Write values, replacing what was there; return how many. As durable as the store itself."""
