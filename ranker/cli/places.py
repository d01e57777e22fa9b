"""Checks that results can be written to their destination, made before hours of work and not after them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ranker.errors import SettingError


def check_file(path: Path) -> None:
    """Raise SettingError unless a file can be written at this path, in an existing folder."""
    if path.is_dir():
        raise SettingError(f"{path} is a folder; choose a file name in it")
    if not path.parent.is_dir():
        raise SettingError(f"cannot write {path.name}: the folder {path.parent} does not exist; create it first")
    _check_writable(path.parent)


def check_folder(path: Path) -> None:
    """Raise SettingError unless files can be written to this folder, which need not exist yet."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise SettingError(f"cannot create the folder {path}: {there} is a file")
    _check_writable(there)


def check_new_folder(path: Path) -> None:
    """Raise SettingError unless this folder can be created and does not exist yet."""
    if path.exists():
        raise SettingError(f"{path} already exists; choose a new folder")
    check_folder(path)


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingError(f"cannot write to {folder}: {error.strerror or error}") from error
