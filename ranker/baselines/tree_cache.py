"""Fitted trees by what they were made of: a folder of text files that may be deleted at any time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

#: The files that are kept; the least recently used ones make room. A model takes about a megabyte.
FILES_MAX = 200


class TreeCache:
    """Models under the digest of the rows and settings that made them. Processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_or_fit(self, made_of: Mapping[str, object], fit: Callable[[], str]) -> str:
        """Return the model made of this, fitting and keeping it first if it is not in the folder.

        Args:
            made_of: everything that determines the model, as plain values.
            fit: makes the model.

        Raises:
            OSError: the folder cannot be written.
        """
        name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        path = self._folder / f"{name}.txt"
        known = _read(path)
        if known is not None:
            os.utime(path)
            return known
        model = fit()
        self._write(path, model)
        return model

    def _write(self, path: Path, model: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # The first line is a digest of the rest, so that a damaged file is fitted again.
        with tempfile.NamedTemporaryFile("w", dir=self._folder, prefix=".writing-", delete=False) as file:
            file.write(_digest(model) + "\n" + model)
        Path(file.name).replace(path)
        found = sorted(self._folder.glob("*.txt"), key=_used_at)
        for old in found[:-FILES_MAX]:
            old.unlink(missing_ok=True)


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0


def _read(path: Path) -> str | None:
    try:
        digest, _, model = path.read_text().partition("\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return model if digest == _digest(model) else None


def _digest(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()
