"""Files read without trusting what lies at their path: a pipe would never end, a sparse file would take all memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnfitFileError(Exception):
    """What lies at a path is no plain file, or a larger one than it may be; the message says which."""


def read_plain(path: Path, bytes_max: int, *, follow_links: bool) -> bytes:
    """Read a plain file.

    Args:
        path: of the file.
        bytes_max: refuse a larger one before it is read.
        follow_links: whether its last part may be a symbolic link.

    Raises:
        UnfitFileError: it is none, or larger.
        OSError: it cannot be opened or read.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnfitFileError(f"it is {_kind(status.st_mode)}, no plain file")
        if status.st_size > bytes_max:
            raise UnfitFileError(f"it has {status.st_size:,} bytes, at most {bytes_max:,} are read")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(status.st_size + 1)
        if len(content) > status.st_size:
            raise UnfitFileError("it grew while it was read")
        return content
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")
