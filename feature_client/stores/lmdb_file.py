"""Opening LMDB's files where the volume is read-only, belongs to another user, or is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import lmdb
import structlog

from feature_client.stores.store import StoreConfigError

_log = structlog.get_logger(__name__)

#: LMDB reserves address space, not disk: the file grows with what is written.
MAP_BYTES = 64 << 30
READERS_MAX = 1024
#: What LMDB needs of `lock.mdb` for so many readers: 64 bytes each, and its own state.
_LOCK_BYTES = 64 * (READERS_MAX + 2)
_READS_MAX = 3


def open_file(path: Path, *, read_only: bool) -> tuple[lmdb.Environment, bool]:
    """Open the store in a folder.

    Without a lock file that it may write, a reader is not seen by writers: it opens the store all the same, says so in
    the log, and must read with `read_values`.

    Returns:
        The environment, and whether it takes part in LMDB's locks.

    Raises:
        StoreConfigError: what is missing and what to do.
        lmdb.Error, OSError: it cannot be opened for another reason.
    """
    data = path / "data.mdb"
    if data.exists() and not os.access(data, os.R_OK if read_only else os.R_OK | os.W_OK):
        what, remedy = ("read", "let it read") if read_only else ("write", "mount it writable and let it write")
        raise StoreConfigError(
            f"user {os.geteuid()} may not {what} {data}; {remedy} the folder and its files"
            + ("" if read_only else ", or set record_actions = false if the server is only to read")
        )
    try:
        _allocate_lock(path / "lock.mdb")
    except OSError as error:
        if not read_only:
            raise StoreConfigError(f"cannot write {path / 'lock.mdb'}: {error.strerror}; {_remedy(error)}") from error
        _log.warning("feature_store_without_lock", path=str(path), reason=error.strerror)
    else:
        return _open(path, read_only=read_only, lock=True), True
    return _open(path, read_only=True, lock=False), False


def read_values(env: lmdb.Environment, keys: Sequence[bytes], *, locked: bool) -> list[bytes | None]:
    """Read from one snapshot. A writer that does not see this reader may reuse a snapshot's pages two commits later."""
    for _ in range(_READS_MAX):
        with env.begin() as transaction:
            get = transaction.get
            found = [get(key) for key in keys]
            if locked or env.info()["last_txnid"] == transaction.id():
                return found
    raise lmdb.Error("it was written to during each of three reads, and there is no lock file to hold a writer back")


def _open(path: Path, *, read_only: bool, lock: bool) -> lmdb.Environment:
    return lmdb.open(
        str(path), map_size=MAP_BYTES, readonly=read_only, lock=lock, max_readers=READERS_MAX, readahead=False
    )


def _allocate_lock(path: Path) -> None:
    """Give the lock file its blocks: LMDB maps it, and a write to a block that a full volume lacks ends the process.

    Raises:
        OSError: it cannot be written, or the volume is full.
    """
    # Where nothing is missing it is not opened: closing it would give up the locks that this process holds on it.
    found = path.stat() if path.exists() else None
    if found is not None and 512 * found.st_blocks >= max(found.st_size, _LOCK_BYTES):
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, max(os.fstat(descriptor).st_size, _LOCK_BYTES))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    finally:
        os.close(descriptor)


def _remedy(error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "free some space on its volume"
    return f"mount the volume writable and let user {os.geteuid()} write the folder and its files"
