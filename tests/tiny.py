"""A tiny model that reads every kind of input, and literal features for it; built in milliseconds without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from feature_client.codec import Rows, RowState, encode_rows, encode_sequence
from feature_client.features import FetchedFeatures
from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar, SequenceGroup
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import write_bundle
from model_store.bundle.golden import GoldenRequest, encode_golden
from model_store.bundle.manifest import Calibration, FileEntry, Head, Lineage, Manifest, Surface
from model_store.bundle.tensor_sources import (
    Category,
    EmbeddingVector,
    QueryVector,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    SurfaceIndex,
    TensorInput,
)
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate

DIM, LENGTH, HEADS = 4, 3, ("save", "hide")
SPACE = EmbeddingSpace(name="tiny", version=1, dim=DIM, dtype="float16")
PINS = FeatureGroup(
    name="pin_core",
    version=1,
    entity="pin",
    fields=(
        Embedding(name="embedding", space=SPACE),
        Scalar(name="popularity", default=0.25),
        Categorical(name="topic", cardinality=8),
    ),
)
USERS = FeatureGroup(
    name="user_core",
    version=1,
    entity="user",
    fields=(Embedding(name="embedding", space=SPACE), Scalar(name="activity")),
)
ACTIONS = SequenceGroup(name="actions", version=1, actions=("save", "hide"), surfaces=("home", "related"), length_max=8)
INPUTS = (
    TensorInput(name="pin_embedding", source=EmbeddingVector(group="pin_core", field="embedding")),
    TensorInput(name="pin_scalars", source=Scalars(group="pin_core", fields=("popularity",))),
    TensorInput(name="pin_topic", source=Category(group="pin_core", field="topic")),
    TensorInput(name="user_embedding", source=EmbeddingVector(group="user_core", field="embedding")),
    TensorInput(name="sequence", source=SequenceEmbeddings(group="pin_core", field="embedding")),
    TensorInput(name="actions", source=SequenceActions()),
    TensorInput(name="surface", source=SurfaceIndex()),
    TensorInput(name="query", source=QueryVector(group="pin_core", field="embedding")),
)
UTILITY = """
[surfaces.home]
weights = { pinner = 1.0, creator = 0.5 }
[surfaces.home.utilities]
pinner = "save - 2 * hide"
creator = "save * sqrt(pin.popularity)"

[surfaces.related]
weights = { pinner = 1.0 }
[surfaces.related.utilities]
pinner = "where(hide > 0.9, 0, save)"
"""


def network(seed: int = 0) -> bytes:
    """Return an ONNX network: logits = candidate side + request side gathered by row; every input changes them."""
    rng = np.random.default_rng(seed)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    h = len(HEADS)
    constants = [
        weights("w_pin", DIM, h), weights("w_scalars", 1, h), weights("w_topic", 8, h), weights("w_user", DIM, h),
        weights("w_sequence", DIM, h), weights("w_actions", 3, h), weights("w_surface", 2, h),
        weights("w_query", DIM, h), weights("w_interest", h),
    ]  # fmt: skip
    node = helper.make_node
    nodes = [
        node("MatMul", ["pin_embedding", "w_pin"], ["a"]),
        node("MatMul", ["pin_scalars", "w_scalars"], ["b"]),
        node("Gather", ["w_topic", "pin_topic"], ["c"]),
        node("Sum", ["a", "b", "c"], ["candidate_side"]),
        node("ReduceSum", ["sequence", "axis1"], ["s"], keepdims=0),
        node("MatMul", ["s", "w_sequence"], ["d"]),
        node("Gather", ["w_actions", "actions"], ["e0"]),
        node("ReduceSum", ["e0", "axis1"], ["e"], keepdims=0),
        node("MatMul", ["user_embedding", "w_user"], ["f"]),
        node("MatMul", ["query", "w_query"], ["g"]),
        node("Gather", ["w_surface", "surface"], ["i"]),
        node("Sum", ["d", "e", "f", "g", "i"], ["request_side"]),
        node("Gather", ["request_side", "row_request"], ["gathered"]),
        # Multiply the user's sequence by the candidate, so that the order depends on both.
        node("Gather", ["s", "row_request"], ["s_rows"]),
        node("Mul", ["s_rows", "pin_embedding"], ["products"]),
        node("ReduceSum", ["products", "axis1"], ["interest"], keepdims=1),
        node("Mul", ["interest", "w_interest"], ["interest_logits"]),
        node("Sum", ["candidate_side", "gathered", "interest_logits"], ["logits"]),
    ]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "axis1"))
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    described: tuple[tuple[str, int, list[str | int | None]], ...] = (
        ("pin_embedding", f32, ["N", DIM]), ("pin_scalars", f32, ["N", 1]), ("pin_topic", i64, ["N"]),
        ("user_embedding", f32, ["R", DIM]), ("sequence", f32, ["R", LENGTH, DIM]), ("actions", i64, ["R", LENGTH]),
        ("surface", i64, ["R"]), ("query", f32, ["R", DIM]), ("row_request", i64, ["N"]),
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info(*one) for one in described]
    outputs = [helper.make_tensor_value_info("logits", f32, ["N", h])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def manifest_fields(version: int = 1) -> dict[str, Any]:
    return {
        "name": "tiny",
        "version": version,
        "groups": (PINS, USERS),
        "sequence": ACTIONS,
        "sequence_length": LENGTH,
        "inputs": INPUTS,
        "heads": (Head(name="save", meaning="saved", calibration=Calibration(slope=0.5, intercept=-0.1)),
                  Head(name="hide", meaning="hid")),
        "surfaces": (Surface(name="home"), Surface(name="related", query=True)),
        "lineage": Lineage(data="literal", data_sha256="0" * 64, command="tests", code="tests", seed=version),
    }  # fmt: skip


def manifest(version: int = 1) -> Manifest:
    return Manifest(**manifest_fields(version), files={"network.onnx": FileEntry(sha256="0" * 64, size_bytes=0)})


def pin_rows(ids: np.ndarray) -> np.ndarray:
    """Return rows that depend only on the ids."""
    rows = np.zeros(len(ids), PINS.dtype)
    for i, pin in enumerate(ids.tolist()):
        rng = np.random.default_rng(pin)
        rows["embedding"][i] = rng.normal(size=DIM)
        rows["popularity"][i] = rng.uniform()
        rows["topic"][i] = pin % 8
    return rows


def changed(group: Any, **changes: Any) -> Any:
    """Return a changed copy of a group; `model_copy` would keep the cached fingerprint."""
    return type(group)(**{**{name: getattr(group, name) for name in type(group).model_fields}, **changes})


def user_rows(ids: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(ids), USERS.dtype)
    for i, user in enumerate(ids.tolist()):
        rows["embedding"][i] = np.random.default_rng(10_000 + user).normal(size=DIM)
    return rows


#: When the rows of `fetched` were read.
READ_MS = 1_700_000_000_000


def events(pins: list[int], actions: list[int]) -> np.ndarray:
    found = np.zeros(len(pins), ACTIONS.dtype)
    found["pin_id"], found["action"] = pins, actions
    found["time_ms"] = np.arange(len(pins)) * 1000
    return found


def features(users: int = 4, pins: int = 50) -> dict[bytes, bytes]:
    """Return literal store contents: users 1..users, each with a sequence, and pins 1..pins."""
    user_ids, pin_ids = np.arange(1, users + 1, dtype=np.uint64), np.arange(1, pins + 1, dtype=np.uint64)
    values = dict(zip(PINS.keys(pin_ids), encode_rows(PINS, pin_rows(pin_ids)), strict=True))
    values |= dict(zip(USERS.keys(user_ids), encode_rows(USERS, user_rows(user_ids)), strict=True))
    sequences = [encode_sequence(ACTIONS, events([user, user + 1], [0, 1])) for user in range(1, users + 1)]
    return values | dict(zip(ACTIONS.keys(user_ids), sequences, strict=True))


def fetched(pins: list[int], history: list[int], user: int = 1, query: int | None = None) -> FetchedFeatures:
    """Return what a fetch returns when all rows are present."""
    rows = pin_rows(np.array([*pins, *history, *([] if query is None else [query])], np.uint64))
    return FetchedFeatures(
        user={"user_core": Rows(user_rows(np.array([user])), np.zeros(1, np.uint8))},
        pins={"pin_core": Rows(rows, np.zeros(len(rows), np.uint8))},
        candidates=len(pins),
        events=events(history, [0] * len(history)),
        has_query_pin=query is not None,
        sequence_state=RowState.PRESENT,
        read_ms=READ_MS,
    )


def golden(content: bytes, fields: dict[str, Any]) -> list[GoldenRequest]:
    described = Manifest(**fields, files={})
    engine = NumpyEngine(content, described.specs, len(HEADS))
    assembler = Assembler(described)
    found = []
    for request, surface in ((fetched([1, 2, 3], [4, 5]), "home"), (fetched([7, 8], [], query=9), "related")):
        logits = engine.run(assembler.assemble(request, surface))
        found.append(GoldenRequest(request, surface, calibrate(described, logits)))
    return found


def write_tiny_bundle(folder: Path, version: int = 1, **changes: Any) -> Manifest:
    """Write a complete, valid bundle; `changes` replace manifest fields, or files by name (`network.onnx`=...)."""
    files = {name: changes.pop(name) for name in list(changes) if "." in name}
    fields = manifest_fields(version) | changes
    content = network(seed=version)
    whole = {
        "network.onnx": content,
        "utility.toml": UTILITY.encode(),
        "golden.npz": encode_golden(golden(content, fields)),
    }
    return write_bundle(folder, fields, whole | files)
