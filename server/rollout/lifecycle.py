"""Decides what to do with each model version as labels move: a table of phases and a policy for the next steps.

Pure and idempotent: `decide` takes a snapshot and returns decisions; until they are carried out, it returns the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    SEEN = "seen"
    VERIFYING = "verifying"
    WARMING = "warming"
    READY = "ready"
    SERVING = "serving"
    DRAINING = "draining"
    GONE = "gone"
    FAILED = "failed"


#: The phases that may follow each phase.
FOLLOWING: Mapping[Phase, frozenset[Phase]] = {
    # A version that was refused before a restart fails at once.
    Phase.SEEN: frozenset({Phase.VERIFYING, Phase.FAILED, Phase.GONE}),
    Phase.VERIFYING: frozenset({Phase.WARMING, Phase.FAILED}),
    Phase.WARMING: frozenset({Phase.READY, Phase.FAILED}),
    Phase.READY: frozenset({Phase.SERVING, Phase.DRAINING}),
    Phase.SERVING: frozenset({Phase.DRAINING}),
    Phase.DRAINING: frozenset({Phase.SERVING, Phase.GONE}),
    Phase.FAILED: frozenset({Phase.SEEN, Phase.GONE}),
    Phase.GONE: frozenset(),
}
_LOADING = frozenset({Phase.VERIFYING, Phase.WARMING})
#: Compiled and in memory, so requests can be routed there at once.
_LOADED = frozenset({Phase.READY, Phase.SERVING, Phase.DRAINING})


class PhaseError(Exception):
    """A change of phase that the table does not allow; a bug."""


def followed(before: Phase, after: Phase) -> Phase:
    """Return `after`. Raises PhaseError when it may not follow `before`."""
    if after not in FOLLOWING[before]:
        raise PhaseError(f"a version cannot go from {before} to {after}")
    return after


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version that the server knows of.

    Attributes:
        phase: its current phase.
        in_flight: how many requests and engine runs use it.
        retry_at_s: when to retry a failed version; infinity if the bundle is at fault.
    """

    phase: Phase
    in_flight: int = 0
    retry_at_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a decision depends on.

    Attributes:
        now_s: the current time, on the clock of `retry_at_s`.
        labels: the labels to serve, most important first, with the version that the store names for each.
        pinned: versions to keep without a label.
        known: the state of every known version.
        routes: the version that answers for each label now.
    """

    now_s: float
    labels: Mapping[str, int]
    pinned: frozenset[int]
    known: Mapping[int, VersionState]
    routes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class See:
    """Add a version to the known ones."""

    version: int


@dataclass(frozen=True, slots=True)
class Load:
    """Verify a version and warm it up; it becomes ready or fails."""

    version: int


@dataclass(frozen=True, slots=True)
class Route:
    """Let a version answer for a label from now on."""

    label: str
    version: int


@dataclass(frozen=True, slots=True)
class Unroute:
    """Stop answering for a label."""

    label: str


@dataclass(frozen=True, slots=True)
class Serve:
    """Let a version without a label answer requests that name it."""

    version: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Send a version no new requests."""

    version: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Free a version that no request uses any more."""

    version: int


@dataclass(frozen=True, slots=True)
class Retry:
    """Try a failed version again."""

    version: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a version that is not in memory."""

    version: int


Decision = See | Load | Route | Unroute | Serve | Drain | Unload | Retry | Forget


def decide(snapshot: Snapshot) -> tuple[Decision, ...]:
    """Return what to do next; empty when nothing is to be done.

    A label's old version answers until the new one is ready, and keeps answering if the new one fails. Versions load
    one at a time, in the order of their labels. A version that no label names any more drains, and is unloaded when its
    last request has ended.
    """
    labels, known, routes = snapshot.labels, snapshot.known, snapshot.routes
    wanted = dict.fromkeys((*labels.values(), *sorted(snapshot.pinned)))
    decisions: list[Decision] = [See(version) for version in wanted if version not in known]
    decisions += [Unroute(label) for label in routes if label not in labels]
    for label, version in labels.items():
        if routes.get(label) != version and version in known and known[version].phase in _LOADED:
            decisions.append(Route(label, version))
    if not any(one.phase in _LOADING for one in known.values()):
        seen = [version for version in wanted if version in known and known[version].phase is Phase.SEEN]
        decisions += [Load(version) for version in seen[:1]]
    for version, one in known.items():
        if version in wanted:
            decisions += _of_wanted(version, one, snapshot)
        elif version not in routes.values():
            decisions += _of_unwanted(version, one)
    return tuple(decisions)


def _of_wanted(version: int, one: VersionState, snapshot: Snapshot) -> list[Decision]:
    if one.phase is Phase.FAILED and snapshot.now_s >= one.retry_at_s:
        return [Retry(version)]
    # A version with a label serves through its route.
    if version not in snapshot.labels.values() and one.phase in {Phase.READY, Phase.DRAINING}:
        return [Serve(version)]
    return []


def _of_unwanted(version: int, one: VersionState) -> list[Decision]:
    match one.phase:
        case Phase.READY | Phase.SERVING:
            return [Drain(version)]
        case Phase.DRAINING if one.in_flight == 0:
            return [Unload(version)]
        case Phase.SEEN | Phase.FAILED:
            return [Forget(version)]
    return []
