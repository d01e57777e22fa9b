"""The manifest of models trained here: groups, inputs, heads and surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feature_client.groups import EmbeddingSpace
from model_store.bundle.manifest import Calibration, Head, Lineage, Manifest, Surface
from ranker.data.actions import ActionSchema
from ranker.data.features import SURFACES, Groups, scalar_names
from ranker.data.inputs import SEQUENCE_LENGTH, network_inputs


def manifest_fields(
    name: str,
    version: int,
    space: EmbeddingSpace,
    schema: ActionSchema,
    heads: Sequence[str],
    lineage: Lineage,
    *,
    sequence: bool,
    similarities: bool = False,
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
        sequence: whether the network reads the user's last actions.
        similarities: whether it reads what `model_store.model.similarities` computes.
        calibrations: one per head; None leaves the logits unchanged.
    """
    groups = Groups.of(space, schema)
    calibrations = calibrations or [Calibration()] * len(heads)
    return {
        "name": name,
        "version": version,
        "groups": (groups.user, groups.pin),
        "sequence": groups.sequence if sequence else None,
        "sequence_length": SEQUENCE_LENGTH if sequence else 0,
        "inputs": network_inputs(scalar_names(schema), sequence=sequence, similarities=similarities),
        "heads": tuple(
            Head(name=head, meaning=schema.rule(head).meaning, calibration=calibration)
            for head, calibration in zip(heads, calibrations, strict=True)
        ),
        "surfaces": tuple(Surface(name=surface, query=surface == "related") for surface in SURFACES),
        "lineage": lineage,
    }


def draft_manifest(
    name: str,
    space: EmbeddingSpace,
    schema: ActionSchema,
    heads: Sequence[str],
    *,
    sequence: bool,
    similarities: bool = False,
) -> Manifest:
    """Return a manifest without files, which suffices to assemble the tensors for training."""
    unknown = Lineage(data="", data_sha256="", command="", code="", seed=0)
    fields = manifest_fields(name, 1, space, schema, heads, unknown, sequence=sequence, similarities=similarities)
    return Manifest(**fields, files={})
