"""A store in this process's memory, for tests and trials."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from feature_client.stores.store import Change, StoreUnavailableError, Swept


class MemoryStore:
    """A store in a dictionary, for tests and literal data. It ends with its process.

    While `failing` is set, every read raises StoreUnavailableError.
    """

    local = True

    def __init__(self, values: Mapping[bytes, bytes] | None = None) -> None:
        self.values: dict[bytes, bytes] = dict(values or {})
        self.failing = False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def multi_get(
        self,
        keys: Sequence[bytes],
        timeout_s: float | None = None,  # noqa: ARG002 - memory answers immediately
    ) -> list[bytes | None]:
        if self.failing:
            raise StoreUnavailableError("the memory store is set to fail")
        return [self.values.get(key) for key in keys]

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        written = dict(items)
        self.values.update(written)
        return len(written)

    async def update(
        self,
        keys: Sequence[bytes],
        change: Change,
        lasts_s: float | None = None,  # noqa: ARG002 - values are swept
    ) -> None:
        before = [self.values.get(key) for key in keys]
        after = change(range(len(keys)), before)
        self.values.update((key, new) for key, new in zip(keys, after, strict=True) if new is not None)

    async def scan(self) -> AsyncIterator[list[bytes]]:
        yield list(self.values)

    async def count(self) -> int:
        return len(self.values)

    async def sweep(
        self, prefix: bytes, start: bytes, count: int, is_over: Callable[[bytes | memoryview], bool]
    ) -> Swept:
        keys = heapq.nsmallest(count + 1, (key for key in self.values if key >= start and key.startswith(prefix)))
        over = [key for key in keys[:count] if is_over(self.values[key])]
        for key in over:
            del self.values[key]
        return Swept(len(keys[:count]), len(over), keys[count] if len(keys) > count else None)
