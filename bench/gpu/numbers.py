"""The file of numbers: JSON, one a line, each on the disk before the next is measured."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A dry run's numbers have a file of their own, so that nobody takes them for measured ones.
FILE, DRY_FILE = "numbers.jsonl", "dry-run.jsonl"
_WHY_CHARS_MAX = 600
OUT_OF_TIME = "the phase's time was up"
WITHOUT = "the phase ended without it"


def file_of(out: Path, *, dry_run: bool) -> Path:
    return out / (DRY_FILE if dry_run else FILE)


class Numbers:
    """Where a phase puts its numbers; after a kill at any moment, all that were put there can be read."""

    def __init__(self, out: Path, phase: str, until_s: float, *, dry_run: bool) -> None:
        """Open the file for appending.

        Args:
            out: the folder of results.
            phase: its name.
            until_s: after which, on the monotonic clock, nothing more begins.
            dry_run: whether the numbers mean nothing.
        """
        self._phase, self.until_s, self.dry_run = phase, until_s, dry_run
        out.mkdir(parents=True, exist_ok=True)
        self._file = os.open(file_of(out, dry_run=dry_run), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    def add(self, what: str, values: Mapping[str, Any]) -> None:
        """Append a line, and return when it is on the disk."""
        line = {"phase": self._phase, "what": what, **({"dry_run": True} if self.dry_run else {}), **values}
        left = (json.dumps(finite(line), allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # whoever wrote last was killed within its line
            left = b"\n" + left
        while left:  # a disk that becomes full takes a part first, and says so at the next one
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)

    def missing(self, what: str, why: str) -> None:
        self.add(what, {"not_measured": why[-_WHY_CHARS_MAX:]})

    def measure(self, what: str, measured: Callable[[], Mapping[str, Any]], needs_s: float = 0.5) -> None:
        """Append what `measured` returns, or why there is nothing: its error, or fewer than `needs_s` seconds left.

        Triton's and CUDA's errors have no root of their own, and none of them may take the other numbers along.
        """
        if self.left_s() < needs_s:
            self.missing(what, OUT_OF_TIME)
            return
        try:
            self.add(what, measured())
        except Exception as error:  # noqa: BLE001 - recorded as the reason
            self.missing(what, f"{type(error).__name__}: {error}"[:_WHY_CHARS_MAX])


@dataclass(frozen=True, slots=True)
class NumbersFile:
    """What a file of numbers holds, and how many of its lines cannot be read: at most the one of each kill."""

    lines: tuple[dict[str, Any], ...]
    unreadable: int


def read(file: Path) -> NumbersFile:
    """Read every finished line; no file is no lines."""
    if not file.exists():
        return NumbersFile((), 0)
    parsed = list(_parsed(file.read_bytes().split(b"\n")))
    return NumbersFile(tuple(line for line in parsed if line is not None), parsed.count(None))


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any] | None]:
    for line in lines:
        if line:
            try:
                value = json.loads(line)
            except ValueError:
                yield None
            else:
                known = isinstance(value, dict) and isinstance(value.get("phase"), str) and "what" in value
                yield value if known else None


def finite(value: Any) -> Any:
    """Return JSON without NaN and infinities, which are no JSON: as text, so that they are seen."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
