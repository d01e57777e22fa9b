"""What training would see of a dataset, and what about it would go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ranker.data.actions import ActionLog
from ranker.data.problems import Problem
from ranker.data.requests import QUERY_AFFINITY, Part, Split, part_slices, producer_until_ms, slice_requests

#: A user is cold below the first number of events and heavy from the second on.
COLD_BELOW, HEAVY_FROM = 10, 100

#: Fewer positives than this teach a head little, or measure it badly.
POSITIVES_MIN = 50

PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class ActionCount:
    """How often an action occurs: in all, and in each of `PARTS`."""

    name: str
    head: bool
    events: int
    share: float
    parts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A dataset in numbers.

    Attributes:
        requests: in each of `PARTS`.
        new_share: which share of the test part's events is on pins without an event before their slice.
        unembedded_share: which share of all parts' events is on pins without an event in the producer's window.
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
    """What training cannot work with; `produced` events lie in the window of the embeddings."""
    users, pins = (len(np.unique(column[:produced])) for column in (log.user, log.pin))
    if min(users, pins) < 2 or not log.schema.affinities[log.action[:produced]].any():
        yield Problem(
            "error",
            f"the window that embeddings are fitted on has {users} users, {pins} pins and too little that they share",
            "give more data; in actions.toml, give the actions that show interest an affinity above 0",
        )
    for part, count in zip(PARTS, found.requests, strict=True):
        if not count:
            yield Problem(
                "error", f"the {part} part has no request", "give more data, spread over more than one moment"
            )


def _warnings(found: Inspection, log: ActionLog) -> Iterator[Problem]:
    """What costs quality."""
    yield from _rare_actions(found)
    if not (log.schema.affinities >= QUERY_AFFINITY).any():
        yield Problem(
            "warning",
            f"no action has an affinity of {QUERY_AFFINITY:g} or more, so no request is asked from a pin",
            "raise the affinity of the action after which users want more of the same",
        )
    if found.cold > 0.5 * found.users:
        yield Problem(
            "warning",
            f"{found.cold / found.users:.0%} of the users have fewer than {COLD_BELOW} events: sequences are short",
            "give a longer time span; expect little more than popularity for these users",
        )
    repeated = len(log.time_ms) - np.unique(np.stack([log.user, log.pin, log.time_ms]), axis=1).shape[1]
    if repeated:
        yield Problem(
            "warning",
            f"{repeated:,} interactions repeat another's user, pin and time",
            "make them one line that holds everything that happened, as signs in a token_seq column",
        )
    if found.unembedded_share > 0.3:
        yield Problem(
            "warning",
            f"{found.unembedded_share:.0%} of the interactions to learn from and to test on are on pins that came "
            "after the window that embeddings are fitted on",
            "these pins get a vector from the users who act on them only; give a longer time span",
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
                f"{action.name} occurs {count:,} times in the {part} part, too seldom to trust what comes of it",
                "give more data, join it with a related action, or set head = false",
            )
