"""Run an ONNX network as PyTorch operations. It supports the operators that exported rankers use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from inspect import signature
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from kernels.engine import EngineError

#: Takes the inputs of a node as arguments, and its attributes by name.
Operator = Callable[..., Any]


class TorchNetwork:
    """A network without functions, with its weights on one device. A call runs its operators in order.

    Integers that only determine shapes stay on the host, because a captured graph must not wait for the device.
    """

    def __init__(
        self, model: onnx.ModelProto, device: torch.device, kernels: Mapping[str, Operator] | None = None
    ) -> None:
        """Raises EngineError if an operator is neither supported here nor, if it has a domain, in `kernels`."""
        self._weights: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            self._weights[tensor.name] = _placed(tensor, device)
        self._steps: list[tuple[Operator, tuple[str, ...], tuple[str, ...]]] = []
        for node in model.graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant" and not node.domain:
                self._weights[node.output[0]] = _placed(attributes["value"], device)
                continue
            operator = (kernels or {} if node.domain else _OPERATORS).get(node.op_type)
            if operator is None:
                raise EngineError(
                    f"the PyTorch backend does not support operator {node.domain or 'onnx'}.{node.op_type}"
                )
            if attributes and not node.domain:
                try:
                    signature(operator).bind_partial(**attributes)
                except (TypeError, ValueError) as error:
                    raise EngineError(
                        f"the PyTorch backend does not support {node.op_type} with {', '.join(attributes)}"
                    ) from error
                operator = partial(operator, **attributes)
            self._steps.append((operator, tuple(node.input), tuple(node.output)))
        self._output = model.graph.output[0].name

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the network's output in float32. `inputs` are tensors on the device, by the network's input names."""
        values: dict[str, Any] = {**self._weights, **inputs, "": None}
        for operator, read, written in self._steps:
            made = operator(*(values[name] for name in read))
            if len(written) == 1:
                values[written[0]] = made
            else:
                values.update(zip(written, made, strict=True))
        output: Tensor = values[self._output]
        return output.float()


def _placed(tensor: TensorProto, device: torch.device) -> Tensor:
    array, dtype = numpy_helper.to_array(tensor), _dtype(tensor.data_type)
    # PyTorch does not accept NumPy arrays of bfloat16.
    value = torch.from_numpy(array.astype("float32" if dtype == torch.bfloat16 else array.dtype)).to(dtype)
    return value if value.dtype == torch.int64 and value.ndim <= 1 else value.to(device)


def _dtype(kind: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, helper.tensor_dtype_to_np_dtype(kind).name)
    return dtype


def _sizes(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1).tolist()]


def _gather(values: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    taken = values.index_select(axis, indices.to(values.device).reshape(-1))
    place = axis % values.ndim
    return taken.reshape(*values.shape[:place], *indices.shape, *values.shape[place + 1 :])


def _gather_nd(values: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        raise EngineError("the PyTorch backend supports GatherND only without batch_dims")
    return values[tuple(indices.to(values.device).unbind(-1))]


def _gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, **turned: int
) -> Tensor:
    a, b = a.T if turned.get("transA") else a, b.T if turned.get("transB") else b
    return alpha * (a @ b) if c is None else torch.addmm(c, a, b, alpha=alpha, beta=beta)


def _layer_norm(
    values: Tensor, gain: Tensor, shift: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    return functional.layer_norm(values, values.shape[axis:], gain, shift, epsilon)


def _pad(values: Tensor, pads: Tensor) -> Tensor:
    before, after = _sizes(pads)[: values.ndim], _sizes(pads)[values.ndim :]
    return functional.pad(values, [room for pair in zip(before[::-1], after[::-1], strict=True) for room in pair])


def _reduced(operator: Operator) -> Operator:
    return lambda values, axes, keepdims=1, **_: operator(values, dim=_sizes(axes), keepdim=bool(keepdims))


def _reshape(values: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = _sizes(shape)
    return values.reshape([values.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(sizes)])


def _slice(
    values: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    where = _sizes(axes) if axes is not None else list(range(len(starts)))
    by = _sizes(steps) if steps is not None else [1] * len(where)
    index = [slice(None)] * values.ndim
    for axis, start, end, step in zip(where, _sizes(starts), _sizes(ends), by, strict=True):
        index[axis] = slice(start, end, step)
    return values[tuple(index)]


def _unsqueeze(values: Tensor, axes: Tensor) -> Tensor:
    rank = values.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in _sizes(axes)):
        values = values.unsqueeze(axis)
    return values


_SAME_NAMES = ("Add", "Div", "Exp", "MatMul", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh", "Where")
_REDUCTIONS: Mapping[str, Operator] = {"Max": torch.amax, "Mean": torch.mean, "Min": torch.amin, "Sum": torch.sum}
_OPERATORS: Mapping[str, Operator] = {
    **{name: getattr(torch, name.lower()) for name in _SAME_NAMES},
    **{name: getattr(torch, f"logical_{name.lower()}") for name in ("And", "Not", "Or", "Xor")},
    **{f"Reduce{name}": _reduced(operator) for name, operator in _REDUCTIONS.items()},
    "Cast": lambda values, to, **_: values.to(_dtype(to)),
    "Clip": lambda values, low=None, high=None: torch.clamp(values, low, high),
    "Concat": lambda *values, axis: torch.cat(values, dim=axis),
    "Equal": torch.eq,
    "Expand": lambda values, shape: values * torch.ones(_sizes(shape), dtype=values.dtype, device=values.device),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": lambda values: values,
    "LayerNormalization": _layer_norm,
    "Max": lambda *values: reduce(torch.maximum, values),
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": lambda values, start=0, end=None: torch.tensor(list(values.shape[start:end])),
    "Slice": _slice,
    "Softmax": lambda values, axis=-1: torch.softmax(values, dim=axis),
    "Split": lambda values, sizes, axis=0, **_: torch.split(values, _sizes(sizes), dim=axis),
    "Squeeze": lambda values, axes: values.squeeze(tuple(_sizes(axes))),
    "Sum": lambda *values: reduce(torch.add, values),
    "Transpose": lambda values, perm=None: values.permute(*(perm or range(values.ndim - 1, -1, -1))),
    "Unsqueeze": _unsqueeze,
}
