"""Reads from the feature store now and then, so that an outage and its end show even if there are no requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from feature_client.stores.store import Store, StoreError

_EVERY_S, _TIMEOUT_S = 1.0, 0.5
#: One slow answer is no outage.
_FAILURES = 3
#: Keys that no feature has; in a cluster, many of them lie on different nodes.
_KEYS = tuple(b"pinrank:probe:%d" % number for number in range(64))


class StoreWatch:
    """Judges whether the feature store can be read. Belongs to one event loop."""

    def __init__(self, store: Store, changed: Callable[[str], Awaitable[None]]) -> None:
        """Create a watch.

        Args:
            store: the feature store, started.
            changed: called when an outage begins, with what is wrong, and when it ends, with an empty text.
        """
        self._store = store
        self._changed = changed
        self._failures = 0

    async def run(self) -> None:
        """Watch the store until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self._store.multi_get(_KEYS, _TIMEOUT_S)
            except StoreError as error:
                self._failures += 1
                if self._failures == _FAILURES:
                    await self._changed(str(error))
            else:
                if self._failures >= _FAILURES:
                    await self._changed("")
                self._failures = 0
