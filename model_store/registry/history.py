"""The versions, labels and traffic of one model, as a history of changes. Pure: the store does the reading and writing.

Every change is an entry: who, when, why, what, and the whole state after it. The newest entry is the current state; all
entries together are the audit trail. An entry is one object, so a change is stored completely or not at all. Each entry
is derived from the one right before it, so a label never names a version that another change removed. The method
`after` of a change returns the new state, or raises ModelStoreError with a fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from feature_client.groups import Frozen
from model_store.registry.objects import NoVersionError, RefusedError

_LABEL = re.compile(r"^[a-z][a-z0-9_-]{0,39}$")
#: The key of the traffic on surfaces without a share of their own.
ANY_SURFACE = "*"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: File names hold the number of an entry with twelve digits.
EntryNumber = Annotated[int, Field(ge=1, lt=10**12)]
Version = Annotated[int, Field(ge=1, lt=1 << 63)]
Share = Annotated[float, Field(ge=0, le=1)]


class Release(Frozen):
    """A published version: the digest of its manifest and, if it is signed, the publisher's signature."""

    digest: Digest
    published_at: AwareDatetime
    published_by: str
    signature: str | None = None


class ModelState(Frozen):
    """The state of a model at one time.

    Attributes:
        versions: releases by version number.
        labels: the version that each label names.
        traffic: by surface (`*`: all others) and label, the share, 0 to 1, of the requests that name no label. The
            remainder goes to the server's default label.
        retired: numbers of retired versions, which are never reused.
    """

    versions: dict[Version, Release] = Field(default_factory=dict)
    labels: dict[str, Version] = Field(default_factory=dict)
    traffic: dict[str, dict[str, Share]] = Field(default_factory=dict)
    retired: tuple[Version, ...] = ()

    @model_validator(mode="after")
    def _names_what_is_there(self) -> ModelState:
        for label, version in self.labels.items():
            if version not in self.versions:
                raise ValueError(f"label {label!r} names version {version}, which does not exist")
        for surface, shares in self.traffic.items():
            if not shares.keys() <= self.labels.keys():
                raise ValueError(f"traffic of {surface!r} goes to a label that does not exist")
        return self

    def next_version(self) -> int:
        return max((*self.versions, *self.retired), default=0) + 1


class VersionPublished(Frozen):
    """A version was published."""

    kind: Literal["published"] = "published"
    version: Version
    digest: Digest
    signature: str | None = None

    def after(self, state: ModelState, model: str, at: AwareDatetime, by: str) -> ModelState:
        if self.version in state.versions or self.version in state.retired:
            what = "already published with other content" if self.version in state.versions else "retired"
            raise RefusedError(
                f"{model}@{self.version} is {what}; versions are immutable: publish as version {state.next_version()}"
            )
        release = Release(digest=self.digest, published_at=at, published_by=by, signature=self.signature)
        return state.model_copy(update={"versions": {**state.versions, self.version: release}})


def check_label(label: str) -> None:
    """Raise RefusedError unless this is a valid label."""
    if not _LABEL.match(label):
        raise RefusedError(f"label {label!r}: use lower-case letters, digits, - and _, starting with a letter")


class LabelMoved(Frozen):
    """A label was moved. It was removed if `version` is None, and created if `before` is None."""

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
                raise RefusedError(f"label {self.label!r} has traffic on {', '.join(held)}; set its share to 0 first")
            return state.model_copy(update={"labels": labels})
        if self.version not in state.versions:
            there = ", ".join(map(str, sorted(state.versions))) or "none"
            raise NoVersionError(f"model {model!r} has no version {self.version} (versions: {there})")
        return state.model_copy(update={"labels": {**labels, self.label: self.version}})


class TrafficSet(Frozen):
    """A label's share of the requests of a surface was changed."""

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
                f"surface {self.surface!r}: each share and the sum of all must be from 0 to 1, not {shares}"
            )
        traffic = {**state.traffic, self.surface: {name: share for name, share in shares.items() if share}}
        return state.model_copy(update={"traffic": {name: shares for name, shares in traffic.items() if shares}})


class VersionsRetired(Frozen):
    """Versions were retired. Their numbers are never reused."""

    kind: Literal["retired"] = "retired"
    versions: tuple[int, ...]

    def after(self, state: ModelState, model: str, at: AwareDatetime, by: str) -> ModelState:  # noqa: ARG002
        for label, version in state.labels.items():
            if version in self.versions:
                raise RefusedError(f"label {label!r} names {model}@{version}; move the label first")
        kept = {number: release for number, release in state.versions.items() if number not in self.versions}
        gone = {*state.retired, *(set(state.versions) & set(self.versions))}
        return state.model_copy(update={"versions": kept, "retired": tuple(sorted(gone))})


AnyChange = VersionPublished | LabelMoved | TrafficSet | VersionsRetired
Change = Annotated[AnyChange, Field(discriminator="kind")]


class HistoryEntry(Frozen):
    """One change of a model. `nonce` distinguishes equal entries of two writers."""

    number: EntryNumber
    at: AwareDatetime
    by: str
    why: str
    change: Change
    state: ModelState
    nonce: str


def versions_named(entries: Iterable[HistoryEntry], label: str) -> Iterator[int]:
    """Yield the versions that a label has named, each once, the most recent first. `entries` are newest first."""
    yielded = set()
    for entry in entries:
        version = entry.state.labels.get(label)
        if version is not None and version not in yielded:
            yielded.add(version)
            yield version


def unlabelled(state: ModelState, keep: int) -> tuple[int, ...]:
    """Return the versions without a label, except the newest `keep` of them."""
    free = sorted(set(state.versions) - set(state.labels.values()))
    return tuple(free[: max(0, len(free) - keep)])


def share_of(state: ModelState, surface: str) -> dict[str, float]:
    """Return the share of a surface's requests by label."""
    return state.traffic.get(surface, state.traffic.get(ANY_SURFACE, {}))
