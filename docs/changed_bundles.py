"""Copies of a bundle with one thing changed: what the stories of docs/models.md publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from feature_client.groups import Embedding, FeatureGroup, GroupField
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import EMBEDDINGS, GOLDEN, NETWORK, PARAMETERS, Bundle, write_bundle
from model_store.bundle.golden import GoldenRequest, decode_golden, encode_golden
from model_store.bundle.manifest import Manifest
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate


def made(
    folder: Path,
    bundle: Bundle,
    version: int,
    change: Callable[[onnx.ModelProto], None] | None = None,
    groups: tuple[FeatureGroup, ...] | None = None,
    *,
    honest: bool = True,
    added: Mapping[str, bytes] | None = None,
) -> None:
    """Write a copy of a bundle with another version and a changed network; `honest` recomputes its golden scores.

    `added` are further files by name.
    """
    names = [name for name in type(bundle.manifest).model_fields if name != "files"]
    fields: dict[str, Any] = {name: getattr(bundle.manifest, name) for name in names}
    fields["version"] = version
    fields["groups"] = groups or bundle.manifest.groups
    files = {name: content for name, content in bundle.files.items() if name not in {EMBEDDINGS, PARAMETERS}}
    files |= added or {}
    if change is not None:
        model = onnx.load_model_from_string(bundle.files[NETWORK])
        change(model)
        files[NETWORK] = model.SerializeToString()
    manifest = Manifest(**fields, files={})
    golden = decode_golden(bundle.files[GOLDEN])
    if honest and change is not None:
        engine, assembler = NumpyEngine(files[NETWORK], manifest.specs, len(manifest.heads)), Assembler(manifest)
        files[GOLDEN] = encode_golden(
            [
                GoldenRequest(
                    g.fetched, g.surface, calibrate(manifest, engine.run(assembler.assemble(g.fetched, g.surface)))
                )
                for g in golden
            ]
        )
    write_bundle(folder, fields, files)


def scaled_logits(scale: float, shift: float) -> Callable[[onnx.ModelProto], None]:
    """Return a change of a network that gives other logits in the same, or the opposite, order."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        for node in graph.node:
            for i, name in enumerate(node.output):
                if name == "logits":
                    node.output[i] = "logits_before"
        for name, value in (("scale", scale), ("shift", shift)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), f"story_{name}"))
        graph.node.append(onnx.helper.make_node("Mul", ["logits_before", "story_scale"], ["logits_scaled"]))
        graph.node.append(onnx.helper.make_node("Add", ["logits_scaled", "story_shift"], ["logits"]))

    return change


def with_moved_embeddings(group: FeatureGroup) -> FeatureGroup:
    """Return the next version of a group, its embeddings in the next version of their space."""
    fields: list[GroupField] = []
    for field in group.fields:
        if isinstance(field, Embedding):
            space = field.space.model_copy(update={"version": field.space.version + 1})
            fields.append(Embedding(name=field.name, space=space))
        else:
            fields.append(field)
    return FeatureGroup(name=group.name, version=group.version + 1, entity=group.entity, fields=tuple(fields))
