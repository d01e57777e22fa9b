"""An ONNX network as PyTorch operations: the operators that exported rankers consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from kernels.engine import LOGITS, EngineError

Operator = Callable[..., Any]

_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.FLOAT16: torch.float16,
}


class TorchNetwork:
    """A network without functions, its weights on one device; calling it runs its operators in order.

    What only says shapes (whole numbers that are weights or come from them) stays on the host, as a captured graph
    must not wait for the device.
    """

    def __init__(self, model: onnx.ModelProto, device: torch.device) -> None:
        """Raises EngineError naming an operator that is not known here."""
        self._weights: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            self._weights[tensor.name] = _placed(tensor, device)
        self._steps: list[tuple[Operator, tuple[str, ...], tuple[str, ...]]] = []
        for node in model.graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant" and not node.domain:
                self._weights[node.output[0]] = _placed(attributes["value"], device)
                continue
            make = _OPERATORS.get(node.op_type) if not node.domain else None
            if make is None:
                raise EngineError(f"PyTorch here knows no operator {node.domain or 'onnx'}.{node.op_type}")
            self._steps.append((make(attributes), tuple(node.input), tuple(node.output)))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return float32[N, H] from tensors on the device, by the network's names."""
        values: dict[str, Any] = {**self._weights, **inputs, "": None}
        for operator, read, written in self._steps:
            made = operator(*(values[name] for name in read))
            if len(written) == 1:
                values[written[0]] = made
            else:
                values.update(zip(written, made, strict=True))
        logits: Tensor = values[LOGITS]
        return logits.float()


def _placed(tensor: onnx.TensorProto, device: torch.device) -> Tensor:
    if tensor.data_type == onnx.TensorProto.BFLOAT16:  # which PyTorch takes from no NumPy array
        return torch.from_numpy(numpy_helper.to_array(tensor).astype("float32")).to(device, torch.bfloat16)
    value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    return value if value.dtype == torch.int64 and value.ndim <= 1 else value.to(device)


def _sizes(values: Tensor) -> list[int]:
    return [int(value) for value in values.tolist()]


def _gather(attributes: dict[str, Any]) -> Operator:
    axis = attributes.get("axis", 0)

    def gather(values: Tensor, indices: Tensor) -> Tensor:
        indices = indices.to(values.device)
        taken = values.index_select(axis, indices.reshape(-1))
        place = axis % values.ndim
        return taken.reshape(*values.shape[:place], *indices.shape, *values.shape[place + 1 :])

    return gather


def _gather_nd(attributes: dict[str, Any]) -> Operator:
    if attributes.get("batch_dims", 0):
        raise EngineError("PyTorch here knows GatherND without batch_dims")
    return lambda values, indices: values[tuple(indices.to(values.device).unbind(-1))]


def _gemm(attributes: dict[str, Any]) -> Operator:
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    first, second = attributes.get("transA", 0), attributes.get("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        if (alpha, beta, first, second) == (1.0, 1.0, 0, 1):
            return functional.linear(a, b, c)
        product: Tensor = alpha * ((a.T if first else a) @ (b.T if second else b))
        return product if c is None else product + beta * c

    return gemm


def _slice(_: dict[str, Any]) -> Operator:
    def cut(
        values: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        where = _sizes(axes) if axes is not None else list(range(len(starts)))
        by = _sizes(steps) if steps is not None else [1] * len(where)
        index = [slice(None)] * values.ndim
        for axis, start, end, step in zip(where, _sizes(starts), _sizes(ends), by, strict=True):
            index[axis] = slice(start, end, step)
        return values[tuple(index)]

    return cut


def _split(attributes: dict[str, Any]) -> Operator:
    axis = attributes.get("axis", 0)
    return lambda values, sizes: torch.split(values, _sizes(sizes), dim=axis)


def _reshape(attributes: dict[str, Any]) -> Operator:
    def reshape(values: Tensor, shape: Tensor) -> Tensor:
        sizes = _sizes(shape)
        if not attributes.get("allowzero", 0):
            sizes = [values.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        return values.reshape(sizes)

    return reshape


def _unsqueeze(_: dict[str, Any]) -> Operator:
    def unsqueeze(values: Tensor, axes: Tensor) -> Tensor:
        rank = values.ndim + axes.numel()
        for axis in sorted(int(axis) % rank for axis in axes.reshape(-1).tolist()):
            values = values.unsqueeze(axis)
        return values

    return unsqueeze


def _layer_norm(attributes: dict[str, Any]) -> Operator:
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)

    def norm(values: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
        return functional.layer_norm(values, values.shape[axis:], gain, shift, epsilon)

    return norm


def _transpose(attributes: dict[str, Any]) -> Operator:
    return lambda values: values.permute(*attributes.get("perm", range(values.ndim - 1, -1, -1)))


def _shape(attributes: dict[str, Any]) -> Operator:
    start, end = attributes.get("start", 0), attributes.get("end")
    return lambda values: torch.tensor(list(values.shape[start:end]))


def _concat(attributes: dict[str, Any]) -> Operator:
    return lambda *values: torch.cat(values, dim=attributes["axis"])


def _plain(operator: Operator) -> Callable[[dict[str, Any]], Operator]:
    return lambda _: operator


def _reduced(operator: Operator) -> Callable[[dict[str, Any]], Operator]:
    def make(attributes: dict[str, Any]) -> Operator:
        keep = bool(attributes.get("keepdims", 1))
        return lambda values, axes: operator(values, dim=_sizes(axes), keepdim=keep)

    return make


_OPERATORS: Mapping[str, Callable[[dict[str, Any]], Operator]] = {
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Cast": lambda attributes: lambda values: values.to(_DTYPES[attributes["to"]]),
    "Concat": _concat,
    "Div": _plain(torch.div),
    "Equal": _plain(torch.eq),
    "Exp": _plain(torch.exp),
    "Expand": _plain(
        lambda values, shape: values * torch.ones(_sizes(shape), dtype=values.dtype, device=values.device)
    ),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": _plain(lambda values: values),
    "LayerNormalization": _layer_norm,
    "MatMul": _plain(torch.matmul),
    "Max": _plain(torch.maximum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Pow": _plain(torch.pow),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _plain(functional.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda attributes: lambda values: torch.softmax(values, dim=attributes.get("axis", -1)),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _plain(lambda values, axes: values.squeeze(tuple(_sizes(axes.reshape(-1))))),
    "Sub": _plain(torch.sub),
    "Sum": _plain(lambda *values: reduce(torch.add, values)),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}
