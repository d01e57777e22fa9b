"""The LMDB store: features in a memory-mapped file on this machine, read by any number of processes."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import lmdb
import structlog

from feature_client.stores.lmdb_file import open_file, read_values
from feature_client.stores.store import Change, StoreConfigError, StoreUnavailableError, Swept

_log = structlog.get_logger(__name__)

_SCAN_KEYS = 20_000
#: The minimum time between attempts to reopen a store that was deleted, replaced or truncated.
_REOPEN_PAUSE_S = 0.5

_Result = TypeVar("_Result")


class EmbeddedStore:
    """A store in an LMDB file on this machine. Many processes can read it while one writes.

    Reads touch memory-mapped pages and run on the event loop's thread; a read costs about 0.4 us per key if the pages
    are in memory. Writes run on another thread.

    LMDB keeps using a file after it was deleted or replaced, and a read beyond the end of a truncated file kills the
    process. The store therefore checks the file before each call (2 us). If another file has taken its place, the store
    opens that one; while there is no complete file, the store is unavailable. Files are opened and closed only on the
    event loop's thread, and never while another thread uses them.

    Attributes:
        reopened: how often the store opened another file in place of the previous one.
    """

    local = True

    def __init__(self, path: Path, *, read_only: bool = False, create: bool = True) -> None:
        self._path = path
        self._data = path / "data.mdb"
        self._data_name = str(self._data)  # a Path costs each `stat` another 2 us
        self._read_only = read_only
        self._create = create and not read_only
        self._started = False
        self._env: lmdb.Environment | None = None
        self._locked = True
        #: Device and inode of the open file, and its size at the last check. LMDB never shrinks a file.
        self._file = (0, 0)
        self._bytes = 0
        #: Another process grew the store beyond the size that this process mapped.
        self._outgrown = False
        self._reopen_at_s = float("-inf")
        #: Held by a thread while it uses the file, and by the event loop while it closes and opens files.
        self._in_use = threading.Lock()
        #: The descriptor of the lock file, if this process sweeps.
        self._sweeping: int | None = None
        self.reopened = 0

    async def start(self) -> None:
        try:
            if not self._create and not self._data.exists():
                raise StoreConfigError(f"no feature store at {self._path}; fill one first, or correct the URL")
            if not self._path.parent.is_dir():  # a typing error is likelier than a wish for several new folders
                raise StoreConfigError(
                    f"cannot create the feature store {self._path}: the folder {self._path.parent} does not exist; "
                    f"create it first (mkdir -p {self._path.parent}), or correct the URL"
                )
            self._path.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreConfigError(f"cannot open the feature store at {self._path}: {error}") from error
        self._open()
        self._started = True

    def _open(self) -> None:
        """Open the file. Raises StoreConfigError if it is not an LMDB file or is truncated."""
        try:
            before = self._data.stat() if self._data.exists() else None
            if before is not None and not stat.S_ISREG(before.st_mode):
                raise StoreConfigError(f"cannot open the feature store at {self._path}: data.mdb is not a regular file")
            env, self._locked = open_file(self._path, read_only=self._read_only)
            found = self._data.stat()
        except (lmdb.Error, OSError) as error:
            raise StoreConfigError(f"cannot open the feature store at {self._path}: {error}") from error
        # LMDB maps the file without checking its size; a read past its end would kill the process.
        wanted = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if before is not None and _identity(before) != _identity(found):
            env.close()
            raise StoreConfigError(
                f"the feature store at {self._path} was replaced while it was being opened; try again"
            )
        if found.st_size < wanted:
            env.close()
            raise StoreConfigError(
                f"the feature store at {self._path} is truncated: {found.st_size} of {wanted} bytes; fill it again"
            )
        self._env, self._file, self._bytes = env, _identity(found), found.st_size
        self._outgrown = False

    async def close(self) -> None:
        self._started = False
        if self._sweeping is not None:
            os.close(self._sweeping)
            self._sweeping = None
        # A cancelled caller may have left a thread at work; unmapping the memory that it uses would kill the process.
        await asyncio.to_thread(self._in_use.acquire)
        try:
            if self._env is not None:
                self._env.close()
                self._env = None
        finally:
            self._in_use.release()

    async def multi_get(
        self,
        keys: Sequence[bytes],
        timeout_s: float | None = None,  # noqa: ARG002 - memory answers immediately
    ) -> list[bytes | None]:
        for last in (False, True):
            try:
                return read_values(self._current(), keys, locked=self._locked)
            except lmdb.MapResizedError as error:
                self._outgrown = True
                if last:
                    raise self._failed("read", error) from error
            except lmdb.Error as error:
                raise self._failed("read", error) from error
        raise AssertionError("one of the two attempts returns or raises")

    async def multi_put(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        return await self._in_thread("write", partial(_put, items))

    async def update(
        self,
        keys: Sequence[bytes],
        change: Change,
        lasts_s: float | None = None,  # noqa: ARG002 - values are swept
    ) -> None:
        await self._in_thread("write", partial(_update, keys, change))

    async def count(self) -> int:
        return int(self._current().stat()["entries"])

    async def sweep(
        self, prefix: bytes, start: bytes, count: int, is_over: Callable[[bytes | memoryview], bool]
    ) -> Swept | None:
        if not self._may_sweep():
            return None
        keys, over, following = await self._in_thread("read", partial(_over, prefix, start, count, is_over))
        # The writers of other processes wait for a transaction, so there is none if there is nothing to delete.
        deleted = await self._in_thread("write", partial(_delete, over, is_over)) if over else 0
        return Swept(keys, deleted, following)

    def _may_sweep(self) -> bool:
        """Return whether this process is the one that sweeps: it keeps a file in the store's folder locked."""
        if self._sweeping is None:
            try:
                descriptor = os.open(self._path / "sweep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise self._failed("lock sweep.lock", error) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._sweeping = descriptor
        return True

    async def scan(self) -> AsyncIterator[list[bytes]]:
        start: bytes | None = b""
        while start is not None:
            keys, start = await self._in_thread("read", partial(_keys_from, start))
            yield keys

    async def _in_thread(self, what: str, work: Callable[[lmdb.Environment], _Result]) -> _Result:
        """Run work on another thread. Raises StoreUnavailableError if it failed or may have used an abandoned file."""

        def run() -> _Result:
            with self._in_use:
                env = self._env
                if env is None or not self._is_in_place():
                    raise StoreUnavailableError(f"the feature store at {self._path} has just been replaced; try again")
                result = work(env)
                if what == "write" and not self._is_in_place():
                    raise StoreUnavailableError(
                        f"the feature store at {self._path} was replaced during the write; try again"
                    )
                return result

        for last in (False, True):
            self._current()
            try:
                return await asyncio.to_thread(run)
            except lmdb.MapResizedError as error:  # raised before any work is done
                self._outgrown = True
                if last:
                    raise self._failed(what, error) from error
            except lmdb.Error as error:
                raise self._failed(what, error) from error
        raise AssertionError("one of the two attempts returns or raises")

    def _failed(self, what: str, error: Exception) -> StoreUnavailableError:
        return StoreUnavailableError(f"the feature store at {self._path} failed to {what}: {error}")

    def _current(self) -> lmdb.Environment:
        """Return the environment of the file that is in place now. Call it on the event loop's thread only.

        Raises:
            StoreUnavailableError: there is no complete file, or a thread still uses the previous one.
        """
        if not self._started:
            raise StoreUnavailableError(f"the feature store at {self._path} is not started")
        if self._env is not None and not self._outgrown and self._is_in_place():
            return self._env
        if not self._in_use.acquire(blocking=False):
            raise StoreUnavailableError(
                f"the feature store at {self._path} must be reopened, but a write is still in progress; try again"
            )
        try:
            if self._env is not None and self._is_in_place():
                self._env.set_mapsize(0)  # adopts the size that the other process set
                self._outgrown = False
                return self._env
            return self._reopen()
        finally:
            self._in_use.release()

    def _is_in_place(self) -> bool:
        """Return whether the open file is still in place and has not shrunk."""
        try:
            found = os.stat(self._data_name)  # noqa: PTH116 - see above
        except OSError:
            return False
        if _identity(found) != self._file or found.st_size < self._bytes:
            return False
        self._bytes = found.st_size
        return True

    def _reopen(self) -> lmdb.Environment:
        if self._env is not None:
            _log.warning("feature_store_replaced", path=str(self._path))
            self._env.close()
            self._env = None
        now_s = time.monotonic()
        if now_s < self._reopen_at_s:
            raise StoreUnavailableError(
                f"the feature store at {self._path} was deleted, replaced or truncated; fill it again"
            )
        try:
            # LMDB would turn an empty file into an empty store.
            if not self._data.exists() or not self._data.stat().st_size:
                raise StoreConfigError(
                    f"the feature store at {self._path} was deleted; fill it again, or move a store there"
                )
            self._open()
        except (StoreConfigError, OSError) as error:
            self._reopen_at_s = now_s + _REOPEN_PAUSE_S
            raise StoreUnavailableError(str(error)) from error
        self.reopened += 1
        _log.warning("feature_store_reopened", path=str(self._path))
        assert self._env is not None, "just opened"  # noqa: S101
        return self._env


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _keys_from(start: bytes, env: lmdb.Environment) -> tuple[list[bytes], bytes | None]:
    """Return the next keys in order, and the key to continue from, None at the end. Each call is one transaction."""
    with env.begin() as transaction, transaction.cursor() as cursor:
        if not (cursor.set_range(start) if start else cursor.first()):
            return [], None
        keys = list(itertools.islice(cursor.iternext(keys=True, values=False), _SCAN_KEYS + 1))
    return (keys, None) if len(keys) <= _SCAN_KEYS else (keys[:-1], keys[-1])


def _over(
    prefix: bytes, start: bytes, count: int, is_over: Callable[[bytes | memoryview], bool], env: lmdb.Environment
) -> tuple[int, list[bytes], bytes | None]:
    """Look at values; return how many, the keys of those whose time is over, and the key to continue from."""
    over: list[bytes] = []
    seen = 0
    with env.begin(buffers=True) as transaction, transaction.cursor() as cursor:
        found = cursor.set_range(max(start, prefix))
        while found and (key := bytes(cursor.key())).startswith(prefix):
            if seen == count:
                return seen, over, key
            seen += 1
            if is_over(cursor.value()):
                over.append(key)
            found = cursor.next()
    return seen, over, None


def _delete(keys: Sequence[bytes], is_over: Callable[[bytes | memoryview], bool], env: lmdb.Environment) -> int:
    deleted = 0
    with env.begin(write=True) as transaction:
        for key in keys:
            value = transaction.get(key)
            if value is not None and is_over(value):  # the user may just have acted
                deleted += transaction.delete(key)
    return deleted


def _update(keys: Sequence[bytes], change: Change, env: lmdb.Environment) -> None:
    with env.begin(write=True) as transaction:  # LMDB admits one writer at a time
        before = [transaction.get(key) for key in keys]
        after = change(range(len(keys)), before)
        for key, old, new in zip(keys, before, after, strict=True):
            if new is not None and new != old:
                transaction.put(key, new)


def _put(items: Iterable[tuple[bytes, bytes]], env: lmdb.Environment) -> int:
    with env.begin(write=True) as transaction, transaction.cursor() as cursor:
        consumed: int = cursor.putmulti(items)[0]
        return consumed
