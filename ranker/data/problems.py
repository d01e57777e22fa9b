"""Problems of data that can be read, each with its fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from feature_client.action_times import AHEAD_MAX_MS, EARLIEST_MS
from ranker.errors import DatasetError

#: The year 2200; no log is that recent, so a later time has another unit or is not a time.
LATEST_MS = 7_258_118_400_000


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem that makes training fail (`error`) or reduces quality (`warning`), and its fix."""

    kind: Literal["error", "warning"]
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}\n  fix: {self.fix}"


def refuse_future(time_ms: np.ndarray, now_ms: int) -> None:
    """Raise DatasetError if interactions lie in the future; call it before storing them."""
    if count := _in_future(time_ms, now_ms):
        raise DatasetError(
            f"{count:,} interactions lie in the future, the newest on {date_of(int(time_ms.max()))}; in a feature "
            "store they would precede everything that users do until then; correct their timestamps or remove them"
        )


def _in_future(time_ms: np.ndarray, now_ms: int) -> int:
    """Count the times that servers would reject as well."""
    return int(np.count_nonzero(time_ms > now_ms + AHEAD_MAX_MS))


def date_of(time_ms: int) -> str:
    return str(np.datetime64(time_ms, "ms").astype("datetime64[D]"))


def time_problems(time_ms: np.ndarray, now_ms: int) -> Iterator[Problem]:
    """Yield the problems of interaction times: int64[E], Unix time in milliseconds."""
    if future := _in_future(time_ms, now_ms):
        yield Problem(
            "warning",
            f"{future:,} interactions lie in the future, the newest on {date_of(int(time_ms.max()))}",
            "correct their timestamps or remove them; `pinrank data fill` refuses to store them, because they would "
            "precede everything that users do until then",
        )
    if early := int((time_ms < EARLIEST_MS).sum()):
        yield Problem(
            "warning",
            f"{early:,} interactions lie before 1990, the oldest on {date_of(int(time_ms.min()))}",
            "write timestamps as Unix times in seconds; if they are only counters, or 0 means a missing time, ages and "
            "time slices are meaningless",
        )
