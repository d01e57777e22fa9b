"""What is known of a network's tensors before it runs: their sizes with the largest batch, and small values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from model_store.bundle.operator_sizes import CONSTANT_VALUES, GROWING_VALUES

#: Tensors that sizes are computed from have a handful of numbers. Larger ones are data.
_ELEMENTS_MAX = 1_024
#: Largest size that may be computed from sizes: from there on, int32 wraps around and no longer grows.
_SIZE_MAX = float(1 << 31)
_WIDE_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(slots=True)
class KnownTensors:
    """What is known of the tensors so far, by name."""

    types: dict[str, TypeProto] = field(default_factory=dict)
    #: Values of the small integer tensors that constants and sizes decide, with the largest batch.
    values: dict[str, np.ndarray] = field(default_factory=dict)
    #: Tensors whose values depend on the values of inputs, and not on their sizes alone.
    data: set[str] = field(default_factory=set)
    #: Tensors whose size, and tensors whose known value, varies with the batch.
    varying: set[str] = field(default_factory=set)
    growing: set[str] = field(default_factory=set)

    def dims(self, name: str) -> list[int]:
        return [dim.dim_value for dim in self.types[name].tensor_type.shape.dim]

    def bytes_of(self, name: str) -> int:
        """Return the bytes of a tensor; a dimension of 0 counts as 1, so that none beside it is without a bound."""
        dtype = helper.tensor_dtype_to_np_dtype(self.types[name].tensor_type.elem_type)
        return math.prod(max(1, dim) for dim in self.dims(name)) * dtype.itemsize

    def add_constant(self, name: str, tensor: TensorProto) -> None:
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if math.prod(tensor.dims) <= _ELEMENTS_MAX:
            self.values[name] = numpy_helper.to_array(tensor)


def add_value(node: NodeProto, known: KnownTensors, version: int) -> None:
    """Compute the value of a small integer tensor with the largest batch, if it follows from known ones."""
    if node.op_type == "Constant" or len(node.output) != 1:
        return
    (output,) = node.output
    if math.prod(known.dims(output)) > _ELEMENTS_MAX:
        return
    if node.op_type in {"Shape", "Size"}:
        grows = node.input[0] in known.varying
        values: Mapping[str, np.ndarray] = {node.input[0]: np.broadcast_to(np.int8(0), known.dims(node.input[0]))}
    else:
        values = {name: known.values[name] for name in node.input if name in known.values}
        if any(name and name not in values for name in node.input):
            return
        grows = any(name in known.growing for name in node.input)
        if not (_grows(node, known, values) if grows else _is_plain(node, values)):
            return
    made = helper.make_model(
        helper.make_graph(
            [node],
            "size",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for n, v in values.items()
            ],
            [helper.make_empty_tensor_value_info(output)],
        ),
        opset_imports=[helper.make_opsetid("", version)],
    )
    try:
        with np.errstate(all="ignore"):
            value = np.asarray(ReferenceEvaluator(made).run(None, dict(values))[0])  # type: ignore[index]
    except Exception:  # noqa: BLE001 - what cannot be computed is not known, and refused where it is a size
        return
    if value.dtype.kind in "iub" and list(value.shape) == known.dims(output):
        known.values[output] = value
        if grows:
            known.growing.add(output)


def _is_plain(node: NodeProto, values: Mapping[str, np.ndarray]) -> bool:
    """Whether every runtime computes the same of these constants: a few operators, and integers."""
    return node.op_type in CONSTANT_VALUES and all(value.dtype.kind in "iub" for value in values.values())


def _grows(node: NodeProto, known: KnownTensors, values: Mapping[str, np.ndarray]) -> bool:
    """Whether the node's value grows with the batch, and is nowhere below 0, given values of which some do."""
    if node.op_type not in GROWING_VALUES:
        return False
    places = GROWING_VALUES[node.op_type]
    if places is not None and any(n in known.growing for i, n in enumerate(node.input) if i not in places):
        return False
    numbers = [values[n] for i, n in enumerate(node.input) if n and (places is None or i in places)]
    if any(v.dtype.kind not in "iu" or np.any(v < 0) for v in numbers):
        return False
    match node.op_type:
        case "Cast":
            return all(a.i in _WIDE_INTEGERS for a in node.attribute if a.name == "to")
        case "Add" | "Mul" | "Sum" | "ReduceProd" | "ReduceSum":
            # A product of all of them bounds each result.
            return math.prod(float(np.prod(np.maximum(v, 2).astype(np.float64))) for v in numbers) < _SIZE_MAX
    return True
