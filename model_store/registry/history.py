"""What a model store says of one model, as a history of whole states. Pure: the store keeps what is decided here.

Every change is an entry: who, when, why, what, and all that holds after it. The newest entry is the present; the
entries are the audit trail. As an entry is one object, a change is there whole or not at all, and a label can never
name a version that some other change removed: each entry is made from the one right before it. Each kind of change
says in `after` what holds then, or raises ModelStoreError, saying what would be possible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from feature_client.groups import Frozen
from model_store.registry.objects import NoVersionError, RefusedError

_LABEL = re.compile(r"^[a-z][a-z0-9_-]{0,39}$")
#: Traffic of a surface without its own line.
ANY_SURFACE = "*"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: Numbers of entries are written with twelve digits.
EntryNumber = Annotated[int, Field(ge=1, lt=10**12)]
Version = Annotated[int, Field(ge=1, lt=1 << 63)]
Share = Annotated[float, Field(ge=0, le=1)]


class Release(Frozen):
    """A published version: its manifest's digest, and the publisher's signature of it, if it was signed."""

    digest: Digest
    published_at: AwareDatetime
    published_by: str
    signature: str | None = None


class ModelState(Frozen):
    """All that a store says of a model at one time.

    Attributes:
        versions: by number.
        labels: the version that each label names.
        traffic: by surface (`*`: the others), the share of requests without a label of their own that a label's version
            answers, 0 to 1; what remains goes to the server's default label.
        retired: numbers that were versions; never used again.
    """

    versions: dict[Version, Release] = Field(default_factory=dict)
    labels: dict[str, Version] = Field(default_factory=dict)
    traffic: dict[str, dict[str, Share]] = Field(default_factory=dict)
    retired: tuple[Version, ...] = ()

    @model_validator(mode="after")
    def _names_what_is_there(self) -> ModelState:
        for label, version in self.labels.items():
            if version not in self.versions:
                raise ValueError(f"label {label!r} names version {version}, which is not there")
        for surface, shares in self.traffic.items():
            if not shares.keys() <= self.labels.keys():
                raise ValueError(f"traffic of {surface!r} goes to a label that is not there")
        return self

    def next_version(self) -> int:
        return max((*self.versions, *self.retired), default=0) + 1


class VersionPublished(Frozen):
    """A version came."""

    kind: Literal["published"] = "published"
    version: Version
    digest: Digest
    signature: str | None = None

    def after(self, state: ModelState, model: str, at: AwareDatetime, by: str) -> ModelState:
        if self.version in state.versions or self.version in state.retired:
            what = "already published with other content" if self.version in state.versions else "retired"
            raise RefusedError(
                f"{model}@{self.version} is {what}; versions are immutable, publish as version {state.next_version()}"
            )
        release = Release(digest=self.digest, published_at=at, published_by=by, signature=self.signature)
        return state.model_copy(update={"versions": {**state.versions, self.version: release}})


def check_label(label: str) -> None:
    """Raise RefusedError for what cannot be a label."""
    if not _LABEL.match(label):
        raise RefusedError(f"label {label!r}: use lower-case letters, digits, - and _, starting with a letter")


class LabelMoved(Frozen):
    """A label moved; `version` None removed it, `before` None made it."""

    kind: Literal["labelled"] = "labelled"
    label: str
    version: int | None
    before: int | None = None

    def after(self, state: ModelState, model: str, at: AwareDatetime, by: str) -> ModelState:  # noqa: ARG002
        check_label(self.label)
        labels = {name: version for name, version in state.labels.items() if name != self.label}
        if self.version is None:
            held = [surface for surface, shares in state.traffic.items() if self.label in shares]
            if held:
                raise RefusedError(f"label {self.label!r} has traffic on {', '.join(held)}; set that to 0 first")
            return state.model_copy(update={"labels": labels})
        if self.version not in state.versions:
            there = ", ".join(map(str, sorted(state.versions))) or "none"
            raise NoVersionError(f"model {model!r} has no version {self.version} (versions: {there})")
        return state.model_copy(update={"labels": {**labels, self.label: self.version}})


class TrafficSet(Frozen):
    """A label's share of a surface's requests changed."""

    kind: Literal["traffic"] = "traffic"
    surface: str
    label: str
    share: float
    before: float = 0.0

    def after(self, state: ModelState, model: str, at: AwareDatetime, by: str) -> ModelState:  # noqa: ARG002
        if self.label not in state.labels:
            known = ", ".join(sorted(state.labels)) or "none yet"
            raise NoVersionError(f"model {model!r} has no label {self.label!r} (labels: {known})")
        shares = {**state.traffic.get(self.surface, {}), self.label: self.share}
        if not 0 <= self.share <= 1 or sum(shares.values()) > 1 + 1e-9:
            raise RefusedError(
                f"surface {self.surface!r}: shares lie from 0 to 1, and all labels' together; this would make {shares}"
            )
        traffic = {**state.traffic, self.surface: {name: share for name, share in shares.items() if share}}
        return state.model_copy(update={"traffic": {name: shares for name, shares in traffic.items() if shares}})


class VersionsRetired(Frozen):
    """Versions went; their numbers are not used again."""

    kind: Literal["retired"] = "retired"
    versions: tuple[int, ...]

    def after(self, state: ModelState, model: str, at: AwareDatetime, by: str) -> ModelState:  # noqa: ARG002
        for label, version in state.labels.items():
            if version in self.versions:
                raise RefusedError(f"{model}@{version} is what label {label!r} names; move the label first")
        kept = {number: release for number, release in state.versions.items() if number not in self.versions}
        gone = {*state.retired, *(set(state.versions) & set(self.versions))}
        return state.model_copy(update={"versions": kept, "retired": tuple(sorted(gone))})


AnyChange = VersionPublished | LabelMoved | TrafficSet | VersionsRetired
Change = Annotated[AnyChange, Field(discriminator="kind")]


class HistoryEntry(Frozen):
    """One change of a model. `nonce` tells two writers' entries of the same words apart."""

    number: EntryNumber
    at: AwareDatetime
    by: str
    why: str
    change: Change
    state: ModelState
    nonce: str


def versions_named(entries: Iterable[HistoryEntry], label: str) -> Iterator[int]:
    """Tell the versions that a label named, each once, as it names or named them last; from entries, newest first."""
    told = set()
    for entry in entries:
        version = entry.state.labels.get(label)
        if version is not None and version not in told:
            told.add(version)
            yield version


def unlabelled(state: ModelState, keep: int) -> tuple[int, ...]:
    """Return the versions without a label, all but the newest `keep`, for retiring."""
    free = sorted(set(state.versions) - set(state.labels.values()))
    return tuple(free[: max(0, len(free) - keep)])


def share_of(state: ModelState, surface: str) -> dict[str, float]:
    """Return the labels' shares of a surface's requests."""
    return state.traffic.get(surface, state.traffic.get(ANY_SURFACE, {}))
