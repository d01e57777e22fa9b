"""Objects as files in a folder, written so that a crash leaves each file complete or absent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_store.bundle.plain_files import UnfitFileError, read_plain
from model_store.registry.objects import ModelStoreError, NoObjectError, StoredObject, UnfitObjectError

#: Prefix of files that a writer has not finished; they are not objects.
_UNFINISHED = ".unfinished-"
#: File that writers lock on volumes that support neither links nor exclusive renames.
_LOCK = ".lock"
_LOCK_WAIT_S = 10.0
_SAFE = re.compile(r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$")
#: Error numbers of volumes that do not support a call.
_UNKNOWN = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


class FolderObjects:
    """Objects in a folder. A writer fills a temporary file beside the target, flushes it to disk and renames it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.where = str(root)

    def get(self, name: str, bytes_max: int) -> bytes:
        with _explained(self.where):
            try:
                return read_plain(self._path(name), bytes_max, follow_links=True)
            except FileNotFoundError as error:
                raise NoObjectError(f"{self.where} has no object {name}") from error
            except UnfitFileError as error:
                raise UnfitObjectError(f"{self.where}/{name}: {error}") from error

    def put(self, name: str, content: bytes) -> None:
        with _explained(self.where):
            path = self._path(name)
            unfinished = self._write(path.parent, content)
            unfinished.replace(path)
            _fsync(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        with _explained(self.where):
            path = self._path(name)
            unfinished = self._write(path.parent, content)
            try:
                name_once(unfinished, path)
            except FileExistsError:
                return False
            finally:
                unfinished.unlink(missing_ok=True)
            _fsync(path.parent)
            return True

    def listed(self, folder: str, after: str = "") -> list[StoredObject]:
        found = []
        with _explained(self.where):
            try:
                entries = os.scandir(self._path(folder))
            except FileNotFoundError:
                return []
            with entries:
                for entry in entries:
                    if entry.name <= after or entry.name.startswith("."):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # it was removed meanwhile
                        continue
                    tag = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
                    found.append(StoredObject(entry.name, status.st_size, status.st_mtime, tag))
        return sorted(found, key=lambda one: one.name)

    def folders(self) -> list[str]:
        with _explained(self.where):
            if not self._root.is_dir():
                raise ModelStoreError(f"there is no model store at {self._root}")
            return sorted(path.name for path in self._root.iterdir() if path.is_dir() and _SAFE.match(path.name))

    def delete(self, name: str) -> None:
        with _explained(self.where):
            self._path(name).unlink(missing_ok=True)

    def sweep(self, folder: str, age_s_min: float) -> int:
        swept = 0
        with _explained(self.where):
            for path in self._path(folder).glob(f"{_UNFINISHED}*"):
                try:
                    if time.time() - path.stat().st_mtime >= age_s_min:
                        path.unlink()
                        swept += 1
                except FileNotFoundError:  # its writer has finished meanwhile
                    continue
        return swept

    def _path(self, name: str) -> Path:
        if not _SAFE.match(name):
            raise ModelStoreError(f"object name {name!r}: use lower-case letters, digits and ._- between slashes")
        return self._root / name

    def _write(self, folder: Path, content: bytes) -> Path:
        """Write and flush a temporary file, which readers ignore."""
        _make(folder)
        path = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR | 0o044)
        try:
            unwritten = memoryview(content)
            while unwritten:
                unwritten = unwritten[os.write(descriptor, unwritten) :]
            os.fsync(descriptor)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return path


def name_once(source: Path, target: Path) -> None:
    """Give a file a new name, unless that name is taken. `source` may remain. Raises FileExistsError.

    A hard link does this: it fails if the name exists. On volumes without links (FAT, SMB, many FUSE) an exclusive
    rename does it. Where that is not supported either, the writers of one host take a lock, which the kernel releases
    if the writer is killed; then writers on several hosts need another volume.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    else:
        return
    try:
        rename_unless_taken(source, target)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    else:
        return
    with _turn(target.parent):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)  # noqa: PTH104 - crash tests count the calls of `os`


def rename_unless_taken(source: Path, target: Path) -> None:
    """Call renameat2(2). Raises OSError: EEXIST, or the error of a volume or C library that does not support it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that only one process on this host renames files into it."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        until_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise ModelStoreError(
                        f"{folder / _LOCK}: another writer has held this lock for {_LOCK_WAIT_S:g} s; try again"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    """Create a folder and its parents, and flush them to disk."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync(folder.parent)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:  # some volumes can flush files but not folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else where
        raise ModelStoreError(f"model store {at}: {error.strerror or error}") from error
