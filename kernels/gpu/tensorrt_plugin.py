"""The fused kernel as a part of TensorRT's plans, which then need neither Triton nor Python to run.

TensorRT (10.7 and later) takes kernels that were compiled ahead of time, as plugins. TensorRT for RTX's Python API has
no such thing; there the encoder stays plain operators.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import GenericAlias, ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kernels.engine import ROW_REQUEST, TensorSpec
from kernels.fusion import DOMAIN, ENCODED, EncoderCall, replace
from kernels.gpu.tiles import TILES
from kernels.gpu.triton_ahead import Ahead, arguments
from kernels.gpu.triton_encoder import TritonEncoder, folded

#: The node that the kernel answers; its inputs are the kernel's arguments.
NODE = "encode_rows"
#: What a request's rows share: computed by the network, read by the kernel.
_SHARED = ("exponentials", "scores", "values", "tokens", "keys", "present")
_MASKED = -1e30


def with_kernel(
    rest: onnx.ModelProto, call: EncoderCall, encoder: TritonEncoder, inputs: Sequence[TensorSpec]
) -> onnx.ModelProto:
    """Return the network with the encoder's call answered by the kernel's node.

    Args:
        rest: `call.rest`, its products already in half precision.
        call: the encoder's.
        encoder: of the same weights.
        inputs: the manifest's.

    Returns:
        A network with one more input, `TILES`. What rows share is computed in float32.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(rest)
    graph = changed.graph
    side = _RequestSide(call, encoder)
    held = dict(zip(arguments()[arguments().index("candidate_map") : -1], encoder.arrays, strict=True))
    names = {TILES: TILES, **{name: side.made[name] for name in _SHARED}, "candidates": call.inputs[2]}
    names |= {name: f"{NODE}.{name}" for name in held}
    node = helper.make_node(
        NODE,
        [names[name] for name in arguments()[:-1]],
        [ENCODED],
        NODE,
        domain=DOMAIN,
        plugin_namespace=DOMAIN,
        plugin_version="1",
        aot=1,
    )
    replace(graph.node, [*side.nodes, node, *graph.node])
    constants = [*side.constants, *(_constant(names[name], array) for name, array in held.items())]
    replace(graph.initializer, [*graph.initializer, *constants])
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    leading = {"request": "requests", "candidate": "rows"}
    entered = [
        helper.make_tensor_value_info(spec.name, kinds[spec.dtype], [leading[spec.side], *spec.shape])
        for spec in inputs
    ]
    entered.append(helper.make_tensor_value_info(ROW_REQUEST, TensorProto.INT64, ["rows"]))
    entered.append(helper.make_tensor_value_info(TILES, TensorProto.INT32, ["tiles", 3]))
    replace(graph.input, entered)
    if DOMAIN not in {opset.domain for opset in changed.opset_import}:
        changed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return changed


def register(plugin: ModuleType, float32: Any, ahead: Ahead, width: int) -> None:
    """Make the kernel known to TensorRT in this process.

    Args:
        plugin: the module `tensorrt.plugin`.
        float32: the library's name of that type.
        ahead: the kernel, for the GPU that is built for.
        width: numbers in an encoded row.
    """
    tensors = arguments()[:-1]
    # Values as types: the library says what its types are only when it is there.
    described: Any = plugin.TensorDesc

    def describe(*given: Any) -> Any:
        candidates = given[tensors.index("candidates")]
        return plugin.from_shape_expr((candidates.shape_expr[0], width), dtype=float32)

    def launch(*given: Any) -> Any:
        params = plugin.KernelLaunchParams()
        params.grid_x = given[tensors.index(TILES)].shape_expr[0]
        params.block_x = ahead.threads
        params.shared_mem = ahead.shared_bytes
        return ahead.name, ahead.ptx, params, plugin.SymIntExprs(0)

    # TensorRT reads the plugin's schema off the functions' signatures.
    answer = GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    plugin.register(f"{DOMAIN}::{NODE}")(_signed(describe, dict.fromkeys(tensors, described), described))
    more = {"outputs": GenericAlias(tuple, (described,)), "tactic": int}
    plugin.aot_impl(f"{DOMAIN}::{NODE}")(_signed(launch, {**dict.fromkeys(tensors, described), **more}, answer))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returned: Any) -> Callable[..., Any]:
    """Give a function of any arguments a signature that names them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=returned)  # type: ignore[attr-defined]
    return function


class _RequestSide:
    """`TritonEncoder.request_side` as ONNX nodes. `made` tells the value of each of `_SHARED`."""

    def __init__(self, call: EncoderCall, encoder: TritonEncoder) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.made: dict[str, str] = {}
        w, length = folded(call.weights), call.shape.length
        longer, wide, narrow = (int(encoder.constants[size]) for size in "LDC")
        actions, embeddings, _ = call.inputs
        own = w["action_table"].shape[1] + len(w["acted"])

        there = self._of("Greater", actions, self._held("nothing", np.array(0, np.int64)))
        present = self._of("Cast", there, to=TensorProto.FLOAT)
        known = self._of(
            "Where", self._of("Unsqueeze", there, self._axes("last", -1)), embeddings, self._held("zero", np.float32(0))
        )
        pins = self._linear(known, "acted", w["acted"], w["acted_bias"])
        kinds = self._of("Gather", self._held("action_table", w["action_table"]), actions)
        tokens = self._of("Concat", kinds, pins, axis=2)
        query_key, bias = w["layer1_query_key"], w["layer1_query_key_bias"]
        asked = self._linear(tokens, "asked", query_key[:own, :own], bias[:own])
        readable = self._of("Unsqueeze", there, self._axes("middle", 1))
        product = self._of("MatMul", asked, self._of("Transpose", tokens, perm=[0, 2, 1]))
        scores = self._of("Where", readable, product, self._held("masked", np.float32(_MASKED)))
        largest = self._of("ReduceMax", scores, self._axes("last", -1), keepdims=1)
        spread = self._of("Exp", self._of("Sub", scores, largest))
        exponentials = self._of("Mul", spread, self._of("Unsqueeze", present, self._axes("middle", 1)))
        values = self._linear(tokens, "values", w["layer1_value_out"][:, :own])
        keys = self._linear(tokens, "keys", query_key[:own, own:].T)

        summed = self._of("ReduceSum", tokens, self._axes("last", -1), keepdims=1)
        mean = self._of("Div", summed, self._held("dim", np.float32(encoder.dim)))
        whole = self._of("Pad", tokens, self._held("pads_whole", np.array([0] * 5 + [encoder.dim - own], np.int64)))
        centred = self._of("Sub", whole, mean)

        rows = longer - length
        self._put("exponentials", exponentials, rows, rows, half=True)
        self._put("scores", scores, rows, rows)
        self._put("values", values, rows, wide - encoder.dim, half=True)
        self._put("tokens", centred, rows, wide - encoder.dim, half=True)
        self._put("keys", keys, rows, narrow - encoder.candidate_dim)
        self._put("present", present, rows)

    def _of(self, operator: str, *read: str, **attributes: Any) -> str:
        name = f"{NODE}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(read), [name], name, **attributes))
        return name

    def _held(self, name: str, array: np.ndarray | np.generic) -> str:
        name = f"{NODE}.{name}"
        if name not in {tensor.name for tensor in self.constants}:
            self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _axes(self, name: str, axis: int) -> str:
        return self._held(f"axis_{name}", np.array([axis], np.int64))

    def _linear(self, read: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        product = self._of("MatMul", read, self._held(f"{name}_weight", np.ascontiguousarray(weight.T)))
        return product if bias is None else self._of("Add", product, self._held(f"{name}_bias", bias))

    def _put(self, role: str, value: str, *room: int, half: bool = False) -> None:
        """Widen a value's last dimensions to the kernel's sizes."""
        pads = np.array([0] * (len(room) + 1) + [0, *room], np.int64)
        padded = self._of("Pad", value, self._held(f"pads_{role}", pads))
        self.made[role] = self._of("Cast", padded, to=TensorProto.BFLOAT16) if half else padded


def _constant(name: str, array: Any) -> TensorProto:
    """Return a weight of PyTorch's as ONNX's."""
    if str(array.dtype) == "torch.bfloat16":
        half = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
        return numpy_helper.from_array(array.float().cpu().numpy().astype(half), name)
    return numpy_helper.from_array(array.cpu().numpy(), name)
