"""Read a file at an untrusted path. A pipe there would never end, and a sparse file could exhaust memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnfitFileError(Exception):
    """The path does not lead to a regular file, or the file exceeds the limit. The message says which."""


def read_plain(path: Path, bytes_max: int, *, follow_links: bool) -> bytes:
    """Read a regular file.

    Args:
        path: path of the file.
        bytes_max: limit on its size, checked before reading.
        follow_links: whether the last part of the path may be a symbolic link.

    Raises:
        UnfitFileError: it is not a regular file, or exceeds `bytes_max`.
        OSError: it cannot be opened or read.
    """
    # Without O_NONBLOCK, opening a pipe would block until a writer opens it.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnfitFileError(f"it is {_kind(status.st_mode)}, not a regular file")
        if status.st_size > bytes_max:
            raise UnfitFileError(f"it has {status.st_size:,} bytes, the limit is {bytes_max:,}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(status.st_size + 1)
        if len(content) > status.st_size:
            raise UnfitFileError("it grew while being read")
        return content
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")
