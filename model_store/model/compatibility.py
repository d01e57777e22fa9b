"""Compare two versions of a model: what must change in callers and in the feature store before one replaces the other.

Every difference that is visible outside the model is a finding: the field, the old and the new value, and the fix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import onnx

from feature_client.groups import Embedding, FeatureGroup, SequenceGroup
from model_store.bundle.files import NETWORK, UTILITY, Bundle
from model_store.bundle.manifest import Manifest, Tuning
from model_store.bundle.statistics import read_statistics
from model_store.model.utility import UtilityError, load_utility


class Effect(StrEnum):
    """Who must act on a difference."""

    #: Callers: their requests would be refused, or would mean something else.
    CALLERS = "callers"
    #: Whoever loads the feature store: it must hold other features first.
    FEATURES = "features"
    #: Nobody; the difference is information.
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference. `field` is a path in the manifest or the name of a file."""

    field: str
    expected: str
    found: str
    effect: Effect
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, found {self.found}" + (f"; {self.fix}" if self.fix else "")


def compare(old: Bundle, new: Bundle) -> list[Finding]:
    """Return the differences between a version and the one that it would replace, those that concern callers first."""
    before, after = old.manifest, new.manifest
    found = [
        *_surfaces(before, after),
        *_heads(before, after),
        *_actions(before.sequence, after.sequence),
        *_groups(before, after),
        *_plain(before, after),
        *_utilities(old, new),
        *_networks(old, new),
        *_ranges(old, new),
        *_lineage(before, after),
    ]
    return sorted(found, key=lambda finding: list(Effect).index(finding.effect))


def breaks_callers(before: Manifest, after: Manifest) -> list[Finding]:
    """Return the differences by which a version would refuse or mislead callers of the one that it would replace."""
    found = [*_surfaces(before, after), *_heads(before, after), *_actions(before.sequence, after.sequence)]
    return [finding for finding in found if finding.effect is Effect.CALLERS]


def _surfaces(before: Manifest, after: Manifest) -> Iterator[Finding]:
    there = {surface.name: surface for surface in after.surfaces}
    for surface in before.surfaces:
        field = f"surfaces.{surface.name}"
        if surface.name not in there:
            yield Finding(
                field, "ranked", "gone", Effect.CALLERS,
                "train the version with this surface, or stop its callers first",
            )  # fmt: skip
        elif there[surface.name].query and not surface.query:
            yield Finding(
                f"{field}.query", "no query needed", "every request needs one", Effect.CALLERS,
                "make callers send a query first; the old version accepts it too"
                if before.query_space else "rank this surface without a query, or under another name",
            )  # fmt: skip
    for name in there.keys() - {surface.name for surface in before.surfaces}:
        yield Finding(f"surfaces.{name}", "none", "ranked", Effect.NOTE)
    ours, theirs = before.query_space, after.query_space
    if ours != theirs and ours is not None:
        yield Finding(
            "inputs.query.space", ours.ref, theirs.ref if theirs else "none", Effect.CALLERS,
            "callers that send embeddings must switch to the new space when the label moves; a query by pin works "
            "with both",
        )  # fmt: skip


def _heads(before: Manifest, after: Manifest) -> Iterator[Finding]:
    there = {head.name: head for head in after.heads}
    for head in before.heads:
        other = there.get(head.name)
        if other is None:
            yield Finding(
                f"heads.{head.name}", head.meaning, "gone", Effect.CALLERS,
                "keep the head: readers of `explanation` and the servers' own utility tables may need it",
            )  # fmt: skip
        elif other.meaning != head.meaning:
            yield Finding(
                f"heads.{head.name}.meaning", repr(head.meaning), repr(other.meaning), Effect.CALLERS,
                "give the head with the new meaning another name",
            )  # fmt: skip
        elif other.calibration != head.calibration:
            yield Finding(
                f"heads.{head.name}.calibration", _calibration(head.calibration), _calibration(other.calibration),
                Effect.NOTE,
            )  # fmt: skip
    names, new_names = [head.name for head in before.heads], [head.name for head in after.heads]
    for name in new_names:
        if name not in names:
            yield Finding(f"heads.{name}", "none", there[name].meaning, Effect.NOTE)
    if [n for n in new_names if n in names] != [n for n in names if n in there]:
        yield Finding(
            "heads", ", ".join(names), ", ".join(new_names), Effect.NOTE,
            "the order of `explanation.heads` changes; callers must look heads up by name",
        )  # fmt: skip


def _calibration(calibration: Any) -> str:
    return f"{calibration.slope:.4f} x + {calibration.intercept:.4f}"


def _actions(before: SequenceGroup | None, after: SequenceGroup | None) -> Iterator[Finding]:
    if before is None or after is None:
        if before is not after:
            yield Finding(
                "sequence", before.ref if before else "none", after.ref if after else "none", Effect.FEATURES,
                f"record actions into {after.ref} first" if after else "",
            )  # fmt: skip
        return
    for field in ("actions", "surfaces"):
        ours, theirs = getattr(before, field), getattr(after, field)
        gone = [name for name in ours if name not in theirs]
        if gone:
            yield Finding(
                f"sequence.{field}", ", ".join(ours), ", ".join(theirs), Effect.CALLERS,
                f"Record calls with {', '.join(gone)} would be refused; keep the old names and append new ones at the "
                "end",
            )  # fmt: skip
        elif ours != theirs:
            yield Finding(f"sequence.{field}", ", ".join(ours), ", ".join(theirs), Effect.NOTE)
    if before.fingerprint != after.fingerprint:
        yield Finding(
            "sequence", _ref(before), _ref(after), Effect.FEATURES,
            f"also write actions to {after.ref} before the label moves (pinrank features follow, or Record)"
            if before.ref != after.ref
            else f"its description changed: give it a new version number ({before.name}@{before.version + 1}), or "
            "serve this version from a feature store of its own",
        )  # fmt: skip


def _groups(before: Manifest, after: Manifest) -> Iterator[Finding]:
    ours, theirs = ({group.name: group for group in manifest.groups} for manifest in (before, after))
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name), theirs.get(name)
        field = f"groups.{name}"
        if other is None:
            yield Finding(field, _ref(one), "not read", Effect.NOTE)
        elif one is None:
            yield Finding(field, "not read", _ref(other), Effect.FEATURES, _load_first(other))
        elif one.fingerprint != other.fingerprint:
            fix = _load_first(other)
            if one.ref == other.ref:
                fix = (
                    f"its description changed: give it a new version number ({one.name}@{one.version + 1}) and load "
                    "that first (pinrank features load), or serve this version from a feature store of its own"
                )
            yield Finding(field, _ref(one), _ref(other), Effect.FEATURES, fix)
            yield from _fields(field, one, other)


def _fields(where: str, one: FeatureGroup, other: FeatureGroup) -> Iterator[Finding]:
    ours, theirs = ({field.name: field for field in group.fields} for group in (one, other))
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        a, b = ours.get(name), theirs.get(name)
        if a == b:
            continue
        shown = []
        for field in (a, b):
            match field:
                case None:
                    shown.append("no such field")
                case Embedding(space=space):
                    shown.append(f"{space.ref} ({space.dtype}[{space.dim}])")
                case _:
                    shown.append(", ".join(f"{k}={v}" for k, v in field.model_dump(exclude={"name"}).items()))
        yield Finding(f"{where}.{name}", shown[0], shown[1], Effect.NOTE)


def _load_first(group: FeatureGroup) -> str:
    return f"load {group.ref} first (pinrank features load); the old version keeps reading its own rows"


def _ref(group: FeatureGroup | SequenceGroup | None) -> str:
    return f"{group.ref} ({group.fingerprint.hex()[:8]})" if group else "none"


def _plain(before: Manifest, after: Manifest) -> Iterator[Finding]:
    for field in ("sequence_length", "golden_tolerance"):
        ours, theirs = getattr(before, field), getattr(after, field)
        if ours != theirs:
            yield Finding(field, f"{ours:g}", f"{theirs:g}", Effect.NOTE)
    if [i.name for i in before.inputs] != [i.name for i in after.inputs]:
        names = [", ".join(i.name for i in manifest.inputs) for manifest in (before, after)]
        yield Finding("inputs", names[0], names[1], Effect.NOTE)


def _utilities(old: Bundle, new: Bundle) -> Iterator[Finding]:
    try:
        before = load_utility(old.files[UTILITY], old.manifest)
        after = load_utility(new.files[UTILITY], new.manifest)
    except UtilityError as error:
        yield Finding(UTILITY, "a valid table", str(error), Effect.CALLERS, "correct the table")
        return
    if before.digest == after.digest:
        return
    for surface in sorted(before.surfaces.keys() & after.surfaces.keys()):
        one, other = before.surfaces[surface], after.surfaces[surface]
        shown = [_weighted(table.parties, table.weights.tolist()) for table in (one, other)]
        if shown[0] != shown[1]:
            yield Finding(f"{UTILITY}: {surface}", shown[0], shown[1], Effect.NOTE)
        if one.at_least != other.at_least:
            thetas = [_thetas(table.at_least) for table in (one, other)]
            yield Finding(f"{UTILITY}: {surface}.at_least", thetas[0], thetas[1], Effect.NOTE)
        for party in one.parties:
            if party in other.parties:
                texts = [table.sources[table.parties.index(party)] for table in (one, other)]
                if texts[0] != texts[1]:
                    yield Finding(f"{UTILITY}: {surface}.{party}", texts[0], texts[1], Effect.NOTE)


def _weighted(parties: Sequence[str], weights: Sequence[float]) -> str:
    return ", ".join(f"{party} x {weight:g}" for party, weight in zip(parties, weights, strict=True))


def _thetas(at_least: Mapping[str, float]) -> str:
    return ", ".join(f"{party} >= {theta:g}" for party, theta in at_least.items()) or "none"


def _networks(old: Bundle, new: Bundle) -> Iterator[Finding]:
    shown = []
    for bundle in (old, new):
        model = onnx.load_model_from_string(bundle.files[NETWORK])
        opsets = ", ".join(f"{i.domain or 'ai.onnx'} {i.version}" for i in model.opset_import)
        shown.append((f"IR {model.ir_version}, {opsets}", f"{len(bundle.files[NETWORK]) / 1e6:.1f} MB"))
    for place, field in enumerate(("opset", "size")):
        if shown[0][place] != shown[1][place]:
            yield Finding(f"{NETWORK}: {field}", shown[0][place], shown[1][place], Effect.NOTE)


def _ranges(old: Bundle, new: Bundle) -> Iterator[Finding]:
    before, after = read_statistics(old), read_statistics(new)
    if before is None or after is None:
        return
    for name in sorted(before.inputs.keys() & after.inputs.keys()):
        ours, theirs = before.inputs[name].span(), after.inputs[name].span()
        if ours != theirs:
            yield Finding(f"ranges.{name}", ours, theirs, Effect.NOTE)


def _lineage(before: Manifest, after: Manifest) -> Iterator[Finding]:
    ours, theirs = before.lineage.model_dump(), after.lineage.model_dump()
    for field in ("data", "data_sha256", "code", "seed", "parent", "command"):
        if ours[field] != theirs[field]:
            yield Finding(f"lineage.{field}", _short(ours[field]), _short(theirs[field]), Effect.NOTE)
    for surface in sorted(before.lineage.tuning.keys() | after.lineage.tuning.keys()):
        tunings = [_tuned(manifest.lineage.tuning.get(surface)) for manifest in (before, after)]
        if tunings[0] != tunings[1]:
            yield Finding(f"lineage.tuning.{surface}", tunings[0], tunings[1], Effect.NOTE)
    metrics: tuple[Mapping[str, float], Mapping[str, float]] = (ours["metrics"], theirs["metrics"])
    for name in sorted(metrics[0].keys() & metrics[1].keys()):
        if metrics[0][name] != metrics[1][name]:
            yield Finding(f"lineage.metrics.{name}", f"{metrics[0][name]:.4f}", f"{metrics[1][name]:.4f}", Effect.NOTE)


def _tuned(tuning: Tuning | None) -> str:
    if tuning is None:
        return "not tuned"
    return f"the most for {tuning.maximised} on {tuning.requests:,} requests of {tuning.data}, gap {tuning.gap:.1e}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
