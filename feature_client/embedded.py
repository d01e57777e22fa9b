from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import lmdb

from feature_client.lmdb_file import MAP_BYTES, open_file, read_values
from feature_client.store import Change, StoreConfigError, StoreUnavailableError

__all__ = ["MAP_BYTES", "EmbeddedStore"]

_SCAN_KEYS = 20_000


class EmbeddedStore:
    """A store in an LMDB file on this machine; many processes may read it while one writes.

    A read touches memory-mapped pages and stays on the event loop's thread: about 0.4 us a key when the pages are in
    memory. Writes go to a thread.
    """

    local = True

    def __init__(self, path: Path, *, read_only: bool = False, create: bool = True) -> None:
        self._path = path
        self._read_only = read_only
        self._create = create and not read_only
        self._env: lmdb.Environment | None = None
        self._locked = True

    async def start(self) -> None:
        try:
            if not self._create and not (self._path / "data.mdb").exists():
                raise StoreConfigError(f"no feature store at {self._path}; fill one first, or correct the URL")
            self._path.mkdir(parents=True, exist_ok=True)
            self._env, self._locked = open_file(self._path, read_only=self._read_only)
        except (lmdb.Error, OSError) as error:
            raise StoreConfigError(f"cannot open the feature store at {self._path}: {error}") from error
        # LMDB maps the file without a look at its size; a read past its end would kill the process.
        wanted = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        found = (self._path / "data.mdb").stat().st_size
        if found < wanted:
            await self.close()
            raise StoreConfigError(
                f"the feature store at {self._path} is cut off: {found} bytes of {wanted}; fill it anew"
            )

    async def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    async def multi_get(
        self,
        keys: Sequence[bytes],
        timeout_s: float | None = None,  # noqa: ARG002 - memory answers at once
    ) -> list[bytes | None]:
        try:
            return read_values(self._opened(), keys, locked=self._locked)
        except lmdb.Error as error:
            raise StoreUnavailableError(f"the feature store at {self._path} failed a read: {error}") from error

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        return await asyncio.to_thread(self._put, items)

    async def update(self, keys: Sequence[bytes], change: Change) -> None:
        await asyncio.to_thread(self._update, keys, change)

    async def scan(self) -> AsyncIterator[list[bytes]]:
        start: bytes | None = b""
        while start is not None:
            keys, start = await asyncio.to_thread(self._keys_from, start)
            yield keys

    def _keys_from(self, start: bytes) -> tuple[list[bytes], bytes | None]:
        """Return the next keys in order, and where to go on; None at the end. A transaction of its own each time."""
        try:
            with self._opened().begin() as transaction, transaction.cursor() as cursor:
                if not (cursor.set_range(start) if start else cursor.first()):
                    return [], None
                keys = list(itertools.islice(cursor.iternext(keys=True, values=False), _SCAN_KEYS + 1))
        except lmdb.Error as error:
            raise StoreUnavailableError(f"the feature store at {self._path} failed a read: {error}") from error
        return (keys, None) if len(keys) <= _SCAN_KEYS else (keys[:-1], keys[-1])

    def _update(self, keys: Sequence[bytes], change: Change) -> None:
        try:
            with self._opened().begin(write=True) as transaction:  # LMDB lets one writer in at a time
                before = [transaction.get(key) for key in keys]
                after = change(range(len(keys)), before)
                for key, old, new in zip(keys, before, after, strict=True):
                    if new is not None and new != old:
                        transaction.put(key, new)
        except lmdb.Error as error:
            raise StoreUnavailableError(f"the feature store at {self._path} failed a write: {error}") from error

    def _put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        try:
            with self._opened().begin(write=True) as transaction, transaction.cursor() as cursor:
                consumed: int = cursor.putmulti(items)[0]
                return consumed
        except lmdb.Error as error:
            raise StoreUnavailableError(f"the feature store at {self._path} failed a write: {error}") from error

    def _opened(self) -> lmdb.Environment:
        if self._env is None:
            raise StoreUnavailableError(f"the feature store at {self._path} is not started")
        return self._env
