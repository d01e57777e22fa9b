"""What is wrong or suspicious about data that can be read, each with what would mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from feature_client.action_times import AHEAD_MAX_MS, EARLIEST_MS
from ranker.errors import DatasetError

if TYPE_CHECKING:
    from ranker.data.recbole import AtomicDataset

#: The year 2200: no log reaches there, so a later time is of another unit or none at all.
LATEST_MS = 7_258_118_400_000


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that stands in the way (`error`) or costs quality (`warning`), and what would mend it."""

    kind: Literal["error", "warning"]
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}\n  fix: {self.fix}"


def problems_of(dataset: AtomicDataset, now_ms: int) -> tuple[Problem, ...]:
    """Return all that is suspicious about a dataset before anything is made of it."""
    return (*dataset.problems, *_time_problems(dataset.time_ms, now_ms), *_label_problems(dataset))


def refuse_future(time_ms: np.ndarray, now_ms: int) -> None:
    """Raise DatasetError when interactions cannot have happened yet: for whoever is about to store them."""
    if count := _in_future(time_ms, now_ms):
        raise DatasetError(
            f"{count:,} interactions lie in the future, the newest on {date_of(int(time_ms.max()))}: stored, they "
            "would stand before everything that users do until then; correct their timestamps, or leave them out"
        )


def _in_future(time_ms: np.ndarray, now_ms: int) -> int:
    """Count the times that servers would not take either."""
    return int(np.count_nonzero(time_ms > now_ms + AHEAD_MAX_MS))


def date_of(time_ms: int) -> str:
    return str(np.datetime64(time_ms, "ms").astype("datetime64[D]"))


def _time_problems(time_ms: np.ndarray, now_ms: int) -> Iterator[Problem]:
    if future := _in_future(time_ms, now_ms):
        yield Problem(
            "warning",
            f"{future:,} interactions lie in the future, the newest on {date_of(int(time_ms.max()))}",
            "correct their timestamps or leave them out; `pinrank data fill` does not store them, as they would stand "
            "before everything that users do until then",
        )
    if early := int((time_ms < EARLIEST_MS).sum()):
        yield Problem(
            "warning",
            f"{early:,} interactions lie before 1990, the oldest on {date_of(int(time_ms.min()))}",
            "timestamps are Unix times in seconds; where they only count, or 0 stands for a missing one, ages and "
            "slices of time mean nothing",
        )


def _label_problems(dataset: AtomicDataset) -> Iterator[Problem]:
    for position, rule in enumerate(dataset.schema.actions):
        if rule.column is not None and len(dataset.labels) and dataset.labels[:, position].all():
            yield Problem(
                "warning",
                f"every interaction is a {rule.name}: what the rule asks of column {rule.column!r} tells nothing apart",
                "check the rule in actions.toml against the column's values; ratings of another scale than 1 to 5 need "
                "rules of their own",
            )
