"""Whether results can be written where they are asked for: tried before hours of work, not after them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ranker.errors import SettingError


def check_file(path: Path) -> None:
    """Raise SettingError unless a file can be written here, into a folder that is there."""
    if path.is_dir():
        raise SettingError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise SettingError(f"{path.parent} is no folder to write {path.name} into; make it first")
    _check_writable(path.parent)


def check_folder(path: Path) -> None:
    """Raise SettingError unless files can be written into this folder, which may have to be made first."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise SettingError(f"{path} cannot be a folder: {there} is a file")
    _check_writable(there)


def check_new_folder(path: Path) -> None:
    """Raise SettingError unless this folder can be made, and is not there yet."""
    if path.exists():
        raise SettingError(f"{path} exists already; name a new folder")
    check_folder(path)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingError(f"cannot write into {folder}: {error.strerror or error}") from error
