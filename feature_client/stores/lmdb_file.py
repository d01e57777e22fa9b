"""How to open LMDB files on volumes that are read-only, full, or owned by another user."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import lmdb
import structlog

from feature_client.stores.store import StoreConfigError

_log = structlog.get_logger(__name__)

#: LMDB reserves address space, not disk space: the file grows as values are written.
MAP_BYTES = 64 << 30
READERS_MAX = 1024
#: The size of `lock.mdb` that LMDB needs for this many readers: 64 bytes each, and some state of its own.
_LOCK_BYTES = 64 * (READERS_MAX + 2)
_READS_MAX = 3


def open_file(path: Path, *, read_only: bool) -> tuple[lmdb.Environment, bool]:
    """Open the LMDB file in a folder.

    Writers do not see a reader that cannot write the lock file. Such a reader opens the store all the same, logs a
    warning, and must read with `read_values`.

    Returns:
        The environment, and whether it takes part in the locking of LMDB.

    Raises:
        StoreConfigError: a permission or disk space is missing; the message names it and the fix.
        lmdb.Error, OSError: the file cannot be opened for another reason.
    """
    data = path / "data.mdb"
    if data.exists() and not os.access(data, os.R_OK if read_only else os.R_OK | os.W_OK):
        what, remedy = (
            ("read", "allow it to read") if read_only else ("write", "mount the volume writable and allow it to write")
        )
        raise StoreConfigError(
            f"user {os.geteuid()} is not allowed to {what} {data}; {remedy} the folder and its files"
            + ("" if read_only else ", or set record_actions = false if the server only needs to read")
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
    """Read values from one snapshot.

    A writer that does not see this reader can reuse the pages of a snapshot two commits later. Without locks, a read is
    therefore repeated if a commit happened meanwhile.
    """
    for _ in range(_READS_MAX):
        with env.begin() as transaction:
            get = transaction.get
            found = [get(key) for key in keys]
            if locked or env.info()["last_txnid"] == transaction.id():
                return found
    raise lmdb.Error(
        "the store was written to during each of three reads, and without a lock file the writer does not wait"
    )


def _open(path: Path, *, read_only: bool, lock: bool) -> lmdb.Environment:
    return lmdb.open(
        str(path), map_size=MAP_BYTES, readonly=read_only, lock=lock, max_readers=READERS_MAX, readahead=False
    )


def _allocate_lock(path: Path) -> None:
    """Allocate the blocks of the lock file: LMDB maps it, and on a full volume a write to a missing block is fatal.

    Raises:
        OSError: the file cannot be written, or the volume is full.
    """
    # A complete file is not opened, because closing it would release the locks that this process holds on it.
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
        return "free space on its volume"
    return f"mount the volume writable and allow user {os.geteuid()} to write the folder and its files"
