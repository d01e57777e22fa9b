"""What training would see of a dataset, and which problems it would meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ranker.data.actions import ActionLog
from ranker.data.atomic.recbole import AtomicDataset
from ranker.data.problems import Problem, time_problems
from ranker.data.requests import QUERY_AFFINITY, Part, Split, part_slices, producer_until_ms, slice_requests

#: A user with fewer events than the first number is cold; with at least the second number, heavy.
COLD_BELOW, HEAVY_FROM = 10, 100

#: With fewer positives, a head learns little and its metrics are unreliable.
POSITIVES_MIN = 50

PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class ActionCount:
    """How often an action occurs, in total and in each of `PARTS`."""

    name: str
    head: bool
    events: int
    share: float
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A dataset in numbers.

    Attributes:
        requests: number of requests in each of `PARTS`.
        new_share: share of the test part's events that are on pins without an event before their slice.
        unembedded_share: share of the events of all parts that are on pins without an event in the producer's window.
    """

    users: int
    pins: int
    events: int
    first_ms: int
    last_ms: int
    cold: int
    light: int
    heavy: int
    actions: tuple[ActionCount, ...]
    requests: tuple[int, ...]
    new_share: float
    unembedded_share: float
    problems: tuple[Problem, ...]


def inspect(log: ActionLog, split: Split) -> Inspection:
    """Count what training would see. Cost: a few passes over the events."""
    lengths = np.diff(log.user_splits)
    spans = {part: part_slices(log, split, part) for part in PARTS}
    requests = tuple(
        sum(len(slice_requests(log, span, 0, np.random.default_rng(0))) for span in spans[part]) for part in PARTS
    )
    ranges = [
        slice(log.before(spans[part][0].start_ms), log.before(spans[part][-1].stop_ms)) if spans[part] else slice(0, 0)
        for part in PARTS
    ]
    actions = tuple(
        ActionCount(
            rule.name,
            rule.head,
            int(log.label(rule.name).sum()),
            float(log.label(rule.name).mean()),
            tuple(int(log.label(rule.name)[events].sum()) for events in ranges),
        )
        for rule in log.schema.actions
    )
    first_event = np.full(len(log.pin_ids), len(log.pin))
    np.minimum.at(first_event, log.pin, np.arange(len(log.pin)))
    produced = log.before(producer_until_ms(log, split))
    later = log.pin[produced:]
    found = Inspection(
        users=len(log.user_ids),
        pins=len(log.pin_ids),
        events=len(log.time_ms),
        first_ms=int(log.time_ms[0]),
        last_ms=int(log.time_ms[-1]),
        cold=int((lengths < COLD_BELOW).sum()),
        light=int(((lengths >= COLD_BELOW) & (lengths < HEAVY_FROM)).sum()),
        heavy=int((lengths >= HEAVY_FROM).sum()),
        actions=actions,
        requests=requests,
        new_share=_share_on_new(log, first_event, [(span.start_ms, span.stop_ms) for span in spans["test"]]),
        unembedded_share=float((first_event[later] >= produced).mean()) if len(later) else 0.0,
        problems=(),
    )
    return replace(found, problems=(*_errors(found, log, produced), *_warnings(found, log)))


def _share_on_new(log: ActionLog, first_event: np.ndarray, spans: list[tuple[int, int]]) -> float:
    on_new = [first_event[log.pin[log.before(a) : log.before(b)]] >= log.before(a) for a, b in spans]
    return float(np.concatenate(on_new).mean()) if on_new else 0.0


def _errors(found: Inspection, log: ActionLog, produced: int) -> Iterator[Problem]:
    """Problems that make training fail; `produced` events lie in the window of the embeddings."""
    users, pins = (len(np.unique(column[:produced])) for column in (log.user, log.pin))
    if min(users, pins) < 2 or not log.schema.affinities[log.action[:produced]].any():
        yield Problem(
            "error",
            f"the window for fitting embeddings has {users} users and {pins} pins with too few actions in common",
            "add more data; in actions.toml, set an affinity above 0 for the actions that show interest",
        )
    for part, count in zip(PARTS, found.requests, strict=True):
        if not count:
            yield Problem(
                "error", f"the {part} part has no request", "add more data that spans more than one point in time"
            )


def _warnings(found: Inspection, log: ActionLog) -> Iterator[Problem]:
    """Problems that reduce the quality of a model."""
    yield from _rare_actions(found)
    if not (log.schema.affinities >= QUERY_AFFINITY).any():
        yield Problem(
            "warning",
            f"no action has an affinity of at least {QUERY_AFFINITY:g}, so no request starts from a pin",
            "raise the affinity of the action after which users want more of the same",
        )
    if found.cold > 0.5 * found.users:
        yield Problem(
            "warning",
            f"{found.cold / found.users:.0%} of the users have fewer than {COLD_BELOW} events, so sequences are short",
            "add data of a longer period; for these users, expect little more than popularity",
        )
    repeated = len(log.time_ms) - np.unique(np.stack([log.user, log.pin, log.time_ms]), axis=1).shape[1]
    if repeated:
        yield Problem(
            "warning",
            f"{repeated:,} interactions have the same user, pin and time as another interaction",
            "merge them into one line that lists all signs in a token_seq column",
        )
    if found.unembedded_share > 0.3:
        yield Problem(
            "warning",
            f"{found.unembedded_share:.0%} of the interactions for training and testing are on pins newer than "
            "the window for fitting embeddings",
            "add data of a longer period; the vectors of these pins derive only from the users who act on them",
        )


def _rare_actions(found: Inspection) -> Iterator[Problem]:
    for action in found.actions:
        if not action.events:
            yield Problem(
                "warning",
                f"no interaction is a {action.name}",
                "check its rule in actions.toml against the column's values",
            )
        elif action.head and min(action.parts) < POSITIVES_MIN:
            count, part = min(zip(action.parts, PARTS, strict=True))
            yield Problem(
                "warning",
                f"{action.name} occurs only {count:,} times in the {part} part, too few for reliable results",
                "add more data, merge it with a related action, or set head = false",
            )


def problems_of(dataset: AtomicDataset, now_ms: int) -> tuple[Problem, ...]:
    """Return the problems of a dataset that show before training."""
    return (*dataset.problems, *time_problems(dataset.time_ms, now_ms), *_label_problems(dataset))


def _label_problems(dataset: AtomicDataset) -> Iterator[Problem]:
    for position, rule in enumerate(dataset.schema.actions):
        if rule.column is not None and len(dataset.labels) and dataset.labels[:, position].all():
            yield Problem(
                "warning",
                f"every interaction is a {rule.name}: the rule for column {rule.column!r} distinguishes nothing",
                "check the rule in actions.toml against the values of the column; ratings on another scale than 1 to 5 "
                "need their own rules",
            )
