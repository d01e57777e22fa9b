"""Record measured numbers as JSON lines, each flushed to disk before the next measurement."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A dry run writes to another file, so that its numbers are not mistaken for measurements.
FILE, DRY_FILE = "numbers.jsonl", "dry-run.jsonl"
_WHY_CHARS_MAX = 600
OUT_OF_TIME = "the phase's time was up"
WITHOUT = "the phase ended without it"


def file_of(out: Path, *, dry_run: bool) -> Path:
    return out / (DRY_FILE if dry_run else FILE)


class Numbers:
    """The recorder of a phase. After a kill at any time, all recorded numbers are readable."""

    def __init__(self, out: Path, phase: str, until_s: float, *, dry_run: bool) -> None:
        """Open the file for appending.

        Args:
            out: folder of the results.
            phase: name of the phase.
            until_s: time on the monotonic clock after which no measurement starts.
            dry_run: whether this is a dry run, whose numbers mean nothing.
        """
        self._phase, self.until_s, self.dry_run = phase, until_s, dry_run
        out.mkdir(parents=True, exist_ok=True)
        self._file = os.open(file_of(out, dry_run=dry_run), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    def add(self, what: str, values: Mapping[str, Any]) -> None:
        """Append a line, and flush it to disk."""
        line = {"phase": self._phase, "what": what, **({"dry_run": True} if self.dry_run else {}), **values}
        left = (json.dumps(finite(line), allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # the last writer was killed within its line
            left = b"\n" + left
        while left:  # a full disk accepts a part first, and reports the error at the next write
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)

    def missing(self, what: str, why: str) -> None:
        self.add(what, {"not_measured": why[-_WHY_CHARS_MAX:]})

    def measure(self, what: str, measured: Callable[[], Mapping[str, Any]], needs_s: float = 0.5) -> None:
        """Append the result of `measured`, or the reason for its absence: an error, or less than `needs_s` left.

        All exceptions are caught, because those of Triton and CUDA have no common base, and one failure must not
        prevent the other measurements.
        """
        if self.left_s() < needs_s:
            self.missing(what, OUT_OF_TIME)
            return
        try:
            self.add(what, measured())
        except Exception as error:  # noqa: BLE001 - the exception is recorded as the reason
            self.missing(what, f"{type(error).__name__}: {error}"[:_WHY_CHARS_MAX])


@dataclass(frozen=True, slots=True)
class NumbersFile:
    """The lines of a file of numbers, and the number of unreadable ones: at most one for each kill."""

    lines: tuple[dict[str, Any], ...]
    unreadable: int


def read(file: Path) -> NumbersFile:
    """Read all complete lines. A missing file has no lines."""
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
    """Replace NaN and infinities, which JSON does not have, by text, so that they stay visible."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
