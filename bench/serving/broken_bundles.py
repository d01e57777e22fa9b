"""Break bundles in different ways. A server must refuse each with its reason, and keep serving."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from model_store.bundle.files import GOLDEN, NETWORK, UTILITY, Bundle
from model_store.bundle.golden import GoldenRequest, decode_golden, encode_golden
from model_store.registry.objects import Objects
from model_store.registry.store import ModelStore

#: An action to perform after the label has moved.
After = Callable[[Objects, ModelStore, int], None]
#: Changed manifest fields, changed files by name, and the action that follows.
Fault = tuple[dict[str, Any], dict[str, bytes], After]


def nothing(objects: Objects, store: ModelStore, version: int) -> None:
    pass


def _wrong_golden(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    wrong = [
        GoldenRequest(golden.fetched, golden.surface, 1 - golden.probabilities)
        for golden in decode_golden(bundle.files[GOLDEN])
    ]
    return {}, {GOLDEN: encode_golden(wrong)}, nothing


def _edited(bundle: Bundle, change: Callable[[onnx.ModelProto], object]) -> Fault:
    model = onnx.load_model_from_string(bundle.files[NETWORK])
    change(model)
    return {}, {NETWORK: model.SerializeToString()}, nothing


def _loop(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    return _edited(bundle, lambda m: m.graph.node.append(onnx.helper.make_node("Loop", ["a"], ["b"])))


def _unknown_operator(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    return _edited(bundle, lambda m: m.graph.node.append(onnx.helper.make_node("Evil", ["a"], ["b"], domain="acme")))


def _external_data(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../../../etc/passwd"

    return _edited(bundle, change)


def _huge_result(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    """A network that exhausts memory when it runs. Its sizes are computed, so that no check of the file detects it."""

    def change(model: onnx.ModelProto) -> None:
        many = onnx.numpy_helper.from_array(np.array([1 << 28], np.int64), "many")
        model.graph.initializer.append(many)
        make = onnx.helper.make_node
        model.graph.node.extend(
            [
                make("Shape", [model.graph.input[0].name], ["its_shape"]),
                make("ReduceProd", ["its_shape"], ["its_size"], keepdims=1),
                make("Mul", ["its_size", "many"], ["giant"]),
                make("ConstantOfShape", ["giant"], ["zeros"]),
                make("ReduceSum", ["zeros"], ["zero"], keepdims=0),
                make("Add", ["logits", "zero"], ["logits_and_zero"]),
            ]
        )
        model.graph.node[-1].output[0] = "logits"
        for node in list(model.graph.node)[:-1]:
            for i, name in enumerate(node.output):
                if name == "logits":
                    node.output[i] = "logits_before"
        model.graph.node[-1].input[0] = "logits_before"

    return _edited(bundle, change)


def _zip_bomb(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0/surface.npy", bytes(50_000_000))
    return {}, {GOLDEN: buffer.getvalue()}, nothing


def _pickle(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    buffer = io.BytesIO()
    np.savez(buffer, **{"0/surface": np.array([{}], object)})  # type: ignore[arg-type]
    return {}, {GOLDEN: buffer.getvalue()}, nothing


def _broken_utility(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    return {}, {UTILITY: b"[surfaces.home]\nweights = {}\n"}, nothing


def _surface_gone(bundle: Bundle, version: int) -> Fault:  # noqa: ARG001
    return {"surfaces": bundle.manifest.surfaces[:1]}, {}, nothing


def _features_missing(bundle: Bundle, version: int) -> Fault:
    """A bundle that reads a version of the pin group that is not in the feature store."""
    groups = []
    for group in bundle.manifest.groups:
        same = {name: getattr(group, name) for name in type(group).model_fields}
        groups.append(type(group)(**{**same, "version": version}) if group.entity == "pin" else group)
    return {"groups": tuple(groups)}, {}, nothing


def _damaged(bundle: Bundle, version: int) -> Fault:
    """A bundle whose file is changed in the model store after the label has moved."""

    def damage(objects: Objects, store: ModelStore, version: int) -> None:
        digest = store.manifest(bundle.manifest.name, version).files[UTILITY].sha256
        objects.put(f"{bundle.manifest.name}/blobs/{digest}", b"damaged")

    return {}, {UTILITY: bundle.files[UTILITY] + f"\n# {version}\n".encode()}, damage


FAULTS: dict[str, Callable[[Bundle, int], Fault]] = {
    "golden scores": _wrong_golden,
    "loop": _loop,
    "damaged file": _damaged,
    "unknown operator": _unknown_operator,
    "features missing": _features_missing,
    "external data": _external_data,
    "zip bomb": _zip_bomb,
    "takes all memory": _huge_result,
    "pickle": _pickle,
    "utility table": _broken_utility,
    "surface gone": _surface_gone,
}
