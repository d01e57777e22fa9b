"""Replace the call of the early-fused encoder by a node that the Triton kernel computes.

Plain operators before the node compute, in float32, what the rows of a request share. PyTorch launches the kernel at
the node. TensorRT, from 10.7 on, uses it as a plugin that is compiled ahead of time.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import GenericAlias, ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.parser import parse_graph

from kernels.engine import TensorSpec
from kernels.fusion import DOMAIN, ENCODED, parse, replace, take_out_encoder
from kernels.gpu.half import Half, with_half_products
from kernels.gpu.tiles import TILES
from kernels.gpu.triton_ahead import arguments, compiled
from kernels.gpu.triton_encoder import TritonEncoder

#: The node that the kernel computes. Its inputs are the kernel's arguments.
NODE = "encode_rows"
_READ = ", ".join(arguments()[:-1])
#: The part of layer 1 that does not depend on candidates, for T actions with E numbers, padded to the kernel's L and D;
#: then the kernel. Names without a definition here come from `_constants` or are weights of the kernel.
_ENCODER = f"""
encoder (int64[R, T] actions, float[R, T, E] embeddings, float[N, E] candidates, int32[M, 3] {TILES})
=> (float[N, W] {ENCODED}) {{
    acted = Cast <to = 9> (actions)
    flags = Cast <to = 1> (acted)
    present = Pad (flags, longer_flags)
    known = Unsqueeze (acted, last)
    read = Where (known, embeddings, zero)
    mapped = MatMul (read, pin_map)
    pins = Add (mapped, pin_bias)
    kinds = Gather (action_table, actions)
    joined = Concat <axis = 2> (kinds, pins)
    own = Pad (joined, longer)
    centred = MatMul (own, centre_map)
    tokens = Cast <to = 16> (centred)
    asked = MatMul (own, query_map)
    asking = Add (asked, query_bias)
    across = Transpose <perm = [0, 2, 1]> (own)
    products = MatMul (asking, across)
    there = Unsqueeze (present, middle)
    readable = Cast <to = 9> (there)
    scores = Where (readable, products, masked)
    largest = ReduceMax <keepdims = 1> (scores, last)
    below = Sub (scores, largest)
    powers = Exp (below)
    factors = Mul (powers, there)
    exponentials = Cast <to = 16> (factors)
    mixed = MatMul (own, value_map)
    values = Cast <to = 16> (mixed)
    keys = MatMul (own, key_map)
    {ENCODED} = {DOMAIN}.{NODE} <plugin_namespace = "{DOMAIN}", plugin_version = "1", aot = 1> ({_READ})
}}
"""


def encoder_alone(encoder: TritonEncoder) -> onnx.ModelProto:
    """Return a network of only the encoder, from `actions`, `embeddings`, `candidates` and `TILES` to `ENCODED`."""
    graph = parse_graph(_ENCODER)
    for name, array in (_constants(encoder) | encoder.arrays).items():
        graph.initializer.append(numpy_helper.from_array(array, name))
    return helper.make_model(graph)


def with_kernel(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], half: Half | None
) -> tuple[onnx.ModelProto, TritonEncoder] | None:
    """Return the network with the node, and its kernel; None if the network has no encoder that the kernel supports.

    The network has the additional input `TILES`. All other products use `half` precision, or float32 if it is None.
    """
    call = take_out_encoder(model, inputs)
    if call is None or not TritonEncoder.serves(call.shape):
        return None
    encoder, rest = TritonEncoder(call.weights, call.shape), parse(call.rest)
    changed = with_half_products(rest, half) if half else rest
    side = encoder_alone(encoder).graph
    known = dict(zip(("actions", "embeddings", "candidates"), call.inputs, strict=True))
    known |= {TILES: TILES, ENCODED: ENCODED}
    for node in side.node:
        for names in (node.input, node.output):
            names[:] = [known.get(name, f"{NODE}.{name}") for name in names]
        node.name = node.output[0]
    for tensor in side.initializer:
        tensor.name = f"{NODE}.{tensor.name}"
    replace(changed.graph.node, [*side.node, *changed.graph.node])
    replace(changed.graph.input, [*model.graph.input, *(value for value in side.input if value.name == TILES)])
    changed.graph.initializer.extend(side.initializer)
    return changed, encoder


def _constants(encoder: TritonEncoder) -> dict[str, np.ndarray]:
    w, own, sizes = encoder.weights, encoder.token_dim, encoder.constants
    longer, wide = sizes["L"] - encoder.shape.length, sizes["D"]
    query_key, value_out = w["layer1_query_key"][:own], w["layer1_value_out"][:, :own]
    constants = {
        "last": np.array([-1]),
        "middle": np.array([1]),
        "longer_flags": np.array([0, 0, 0, longer]),
        "longer": np.array([0, 0, 0, 0, longer, 0]),
        "zero": np.array(0.0, np.float32),
        "masked": np.array(-1e30, np.float32),
        "action_table": w["action_table"],
        "pin_map": w["acted"].T,
        "pin_bias": w["acted_bias"],
        # Subtracts each token's mean over the columns that are not padding.
        "centre_map": np.eye(own, wide, dtype=np.float32) - (np.arange(wide) < encoder.dim) / np.float32(encoder.dim),
        "query_map": query_key[:, :own].T,
        "query_bias": w["layer1_query_key_bias"][:own],
        "value_map": np.pad(value_out.T, [(0, 0), (0, wide - encoder.dim)]),
        "key_map": np.pad(query_key[:, own:], [(0, 0), (0, sizes["C"] - encoder.candidate_dim)]),
    }
    return {name: np.array(array, order="C") for name, array in constants.items()}


def register(trt: ModuleType, encoder: TritonEncoder, architecture: str) -> None:
    """Register the kernel with TensorRT in this process, compiled for a compute capability such as `9.0`."""
    plugin, ahead = importlib.import_module(f"{trt.__name__}.plugin"), compiled(encoder, architecture)
    # TensorRT reads schemas from signatures, and its types exist only at run time, so signatures are built at run time.
    described: Any = plugin.TensorDesc
    tensors = dict.fromkeys(arguments()[:-1], described)

    def describe(*given: Any) -> Any:
        rows = given[list(tensors).index("candidates")].shape_expr[0]
        return plugin.from_shape_expr((rows, encoder.width), dtype=trt.float32)

    def launch(*given: Any) -> Any:
        params = plugin.KernelLaunchParams()
        params.grid_x = given[list(tensors).index(TILES)].shape_expr[0]
        params.block_x, params.shared_mem = ahead.threads, ahead.shared_bytes
        return ahead.name, ahead.ptx, params, plugin.SymIntExprs(0)

    answer = GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    more = {"outputs": GenericAlias(tuple, (described,)), "tactic": int}
    plugin.register(f"{DOMAIN}::{NODE}")(_signed(describe, tensors, described))
    plugin.aot_impl(f"{DOMAIN}::{NODE}")(_signed(launch, tensors | more, answer))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returned: Any) -> Callable[..., Any]:
    """Give a function with variadic arguments an explicit signature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=returned)  # type: ignore[attr-defined]
    return function
