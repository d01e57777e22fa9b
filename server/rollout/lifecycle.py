"""What a server does with versions as labels move: a table of phases, and a policy that names the next steps.

Pure and idempotent: `decide` looks at a snapshot and says what to do; asked again before that is done, it says the
same.
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


#: What may follow what.
FOLLOWING: Mapping[Phase, frozenset[Phase]] = {
    # Failed at once: it was refused before a restart.
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
#: Compiled and in memory: requests can be sent there at once.
_LOADED = frozenset({Phase.READY, Phase.SERVING, Phase.DRAINING})


class PhaseError(Exception):
    """A step that the table does not allow: a bug."""


def followed(before: Phase, after: Phase) -> Phase:
    """Return `after`. Raises PhaseError when it may not follow `before`."""
    if after not in FOLLOWING[before]:
        raise PhaseError(f"{before} is not followed by {after}")
    return after


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version that the server knows of.

    Attributes:
        phase: where it is.
        in_flight: requests that hold it.
        retry_at_s: of a failed one, when to try again; never, if the bundle is at fault.
    """

    phase: Phase
    in_flight: int = 0
    retry_at_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a decision depends on.

    Attributes:
        now_s: the clock of `retry_at_s`.
        labels: the labels to serve, the most important first, and the version that the store says of each.
        pinned: versions to hold without a label.
        known: by version.
        routes: the version that answers for each label now.
    """

    now_s: float
    labels: Mapping[str, int]
    pinned: frozenset[int]
    known: Mapping[int, VersionState]
    routes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class See:
    """Begin to know a version."""

    version: int


@dataclass(frozen=True, slots=True)
class Load:
    """Verify and warm a version; then it is ready, or failed."""

    version: int


@dataclass(frozen=True, slots=True)
class Route:
    """Let a version answer for a label from now on."""

    label: str
    version: int


@dataclass(frozen=True, slots=True)
class Unroute:
    """Let nobody answer for a label any more."""

    label: str


@dataclass(frozen=True, slots=True)
class Serve:
    """Let a version without a label answer those who ask for it."""

    version: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Give a version no new requests."""

    version: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Free a version that no request holds; it is gone."""

    version: int


@dataclass(frozen=True, slots=True)
class Retry:
    """See a failed version anew."""

    version: int


@dataclass(frozen=True, slots=True)
class Forget:
    """A version that was never loaded is gone."""

    version: int


Decision = See | Load | Route | Unroute | Serve | Drain | Unload | Retry | Forget


def decide(snapshot: Snapshot) -> tuple[Decision, ...]:
    """Return what to do next; nothing when all is as it should be.

    A label's old version answers until its new one is ready, and goes on answering where that one fails. One version is
    loaded at a time, those of the first labels first. What no label names any more drains, and is unloaded once the
    last request has let go of it.
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
    # What a label names is served by its route.
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
