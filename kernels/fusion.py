"""Find the call of the early-fused encoder in an ONNX network, and separate it from the rest.

An exported ranker may call `pinrank.EarlyFusedEncoder`, a function that the same file defines in plain ONNX operators.
Every runtime can therefore run the file unchanged; an engine with a kernel for the encoder replaces the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

from kernels.encoder import EncoderShape
from kernels.engine import ROW_REQUEST, EngineError, TensorSpec

DOMAIN = "pinrank"
ENCODER = "EarlyFusedEncoder"
#: The output of the call: float32[N, K * d].
ENCODED = "encoded"
#: Number of the computation that the kernels implement. A function that computes something else needs another number.
FORM = 1
#: The first inputs of the function, by role. The folded weights follow, under their own names.
ENCODER_INPUTS = ("actions", "embeddings", "candidates", "row_request")


@dataclass(frozen=True, slots=True)
class EncoderCall:
    """A network in two parts: the encoder call, and the rest, which has `ENCODED` as an additional input.

    Attributes:
        rest: the network without the call, as the content of an ONNX file.
        weights: float32 arrays by name.
        shape: shape of the encoder.
        inputs: names of the network's inputs that the encoder reads as actions, embeddings and candidates.
    """

    rest: bytes
    weights: dict[str, np.ndarray]
    shape: EncoderShape
    inputs: tuple[str, ...]


def parse(network: bytes) -> onnx.ModelProto:
    """Parse and check the content of an ONNX file. Raises EngineError if it is invalid."""
    try:
        model = onnx.load_model_from_string(network)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise EngineError(f"the network cannot be loaded: {error}") from error
    return model


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with all function calls inlined."""
    return inline_local_functions(model) if model.functions else model


def replace(field: Any, kept: Sequence[Any]) -> None:
    """Replace the content of a repeated field by `kept`, whose items may belong to the field."""
    copies = [type(item).FromString(item.SerializeToString()) for item in kept]
    del field[:]
    field.extend(copies)


def take_out_encoder(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> EncoderCall | None:
    """Separate the encoder call from a network.

    Returns:
        None if there is no such call, or if its arguments are not plain inputs and weights of the network.
    """
    calls = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == ENCODER]
    functions = [function for function in model.functions if function.domain == DOMAIN and function.name == ENCODER]
    if len(calls) != 1 or len(functions) != 1:
        return None
    call, (function,) = calls[0], functions
    attributes = {a.name: helper.get_attribute_value(a) for a in call.attribute}
    if attributes.get("form") != FORM or len(call.input) != len(function.input) or list(call.output) != [ENCODED]:
        return None
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = dict(zip(function.input, call.input, strict=True))
    read = tuple(taken.get(role, "") for role in ENCODER_INPUTS)
    names = {name: value for name, value in taken.items() if name not in ENCODER_INPUTS}
    lengths = {spec.name: spec.shape[0] if spec.shape else 0 for spec in inputs}
    if not lengths.keys() >= set(read[:3]) or read[3] != ROW_REQUEST or not held.keys() >= set(names.values()):
        return None
    weights = {name: numpy_helper.to_array(held[value]) for name, value in names.items()}
    shape = EncoderShape(lengths[read[0]], attributes["rows"], attributes["layers"], attributes["epsilon"])
    return EncoderCall(_without(model, call), weights, shape, read[:3])


def _without(model: onnx.ModelProto, call: onnx.NodeProto) -> bytes:
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    graph = rest.graph
    del rest.functions[:]
    nodes = [node for node in graph.node if node.output[0] != call.output[0]]
    read = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    entered = [value for value in graph.input if value.name in read]
    width = next(value for value in graph.value_info if value.name == call.output[0])
    replace(graph.node, nodes)
    replace(graph.initializer, initializers)
    replace(graph.input, [*entered, width])
    content: bytes = rest.SerializeToString()
    return content
