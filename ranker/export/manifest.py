"""The manifest of models trained here: groups, inputs, heads and surfaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup
from model_store.bundle.manifest import Calibration, Head, Lineage, Manifest, Surface
from ranker.data.actions import ActionSchema
from ranker.data.atomic.described import Described
from ranker.data.features import PIN_GROUP, SURFACES, Groups
from ranker.data.inputs import network_inputs


def manifest_fields(
    name: str,
    version: int,
    space: EmbeddingSpace,
    schema: ActionSchema,
    heads: Sequence[str],
    lineage: Lineage,
    *,
    sequence_length: int,
    similarities: bool = False,
    recency: bool = False,
    interests: int = 0,
    users: EmbeddingSpace | None = None,
    described: Described | None = None,
    calibrations: Sequence[Calibration] | None = None,
) -> dict[str, Any]:
    """Return all fields of the manifest except `files`.

    Args:
        name: name of the model.
        version: version of the model.
        space: embedding space of the pins.
        schema: the actions; gives the vocabulary of the sequence, the counted shares, and the meaning of each head.
        heads: heads in the order of the network's columns.
        lineage: origin of the model.
        sequence_length: how many of the user's last actions the network reads; 0 for none.
        similarities: whether it reads what `model_store.model.similarities` computes.
        recency: whether it reads what `model_store.model.recency` computes.
        interests: how many of a user's interests it reads.
        users: the space of the users' vectors that it reads; None if it reads none.
        described: the data's own columns that are features.
        calibrations: one per head; None leaves the logits unchanged.
    """
    groups = Groups.of(space, schema, described, interests, users)
    calibrations = calibrations or [Calibration()] * len(heads)
    return {
        "name": name,
        "version": version,
        "groups": (groups.user, groups.pin, *(one.group for one in groups.further)),
        "sequence": groups.sequence if sequence_length else None,
        "sequence_length": sequence_length,
        "inputs": network_inputs(groups, sequence=sequence_length > 0, similarities=similarities, recency=recency),
        "heads": tuple(
            Head(name=head, meaning=schema.rule(head).meaning, calibration=calibration)
            for head, calibration in zip(heads, calibrations, strict=True)
        ),
        "surfaces": tuple(Surface(name=surface, query=surface == "related") for surface in SURFACES),
        "lineage": lineage,
    }


def in_space(draft: Manifest, space: EmbeddingSpace, published: Iterable[Manifest]) -> Manifest:
    """Return a draft whose pins have vectors of a space, and whose groups overwrite no other's rows.

    Rows are stored by name and version. A group of another description than a published one, such as with vectors of
    another space, gets a free version, so that servers can read both. One of the same description keeps its version.
    """
    others = [group for manifest in published for group in manifest.groups]
    drafted, groups = draft.embedding_field(PIN_GROUP, "embedding").space, []
    for group in draft.groups:
        own = tuple(
            f.model_copy(update={"space": space}) if isinstance(f, Embedding) and f.space == drafted else f
            for f in group.fields
        )
        groups.append(_beside(group.model_copy(update={"fields": own}), others))
    return draft.model_copy(update={"groups": tuple(groups)})


def _beside(group: FeatureGroup, others: Iterable[FeatureGroup]) -> FeatureGroup:
    taken = {other.version: other.fingerprint for other in others if other.name == group.name}
    for version, fingerprint in taken.items():
        if (known := group.model_copy(update={"version": version})).fingerprint == fingerprint:
            return known
    return group.model_copy(update={"version": next(v for v in count(group.version) if v not in taken)})


def draft_manifest(
    name: str,
    space: EmbeddingSpace,
    schema: ActionSchema,
    heads: Sequence[str],
    *,
    sequence_length: int,
    similarities: bool = False,
    recency: bool = False,
    interests: int = 0,
    users: EmbeddingSpace | None = None,
    described: Described | None = None,
) -> Manifest:
    """Return a manifest without files, which suffices to assemble the tensors for training."""
    unknown = Lineage(data="", data_sha256="", command="", code="", seed=0)
    fields = manifest_fields(
        *(name, 1, space, schema, heads, unknown),
        sequence_length=sequence_length,
        similarities=similarities,
        recency=recency,
        interests=interests,
        users=users,
        described=described,
    )
    return Manifest(**fields, files={})
