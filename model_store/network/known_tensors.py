"""What is known of a network's tensors before it runs: their sizes in the batches that show most, and small values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from model_store.network.batches import Batches
from model_store.network.operator_sizes import CONSTANT_VALUES, VARYING_VALUES

#: Tensors that sizes are computed from have a handful of numbers. Larger ones are data.
_ELEMENTS_MAX = 1_024
#: Limit on sizes that others are computed from: from there on, int32 wraps around.
_SIZE_MAX = float(1 << 31)
_WIDE_INTEGERS = frozenset({TensorProto.INT32, TensorProto.INT64})


@dataclass(slots=True)
class KnownTensors:
    """What is known of the tensors so far, by name. Lists have one element for each batch."""

    batches: Batches
    types: dict[str, list[TypeProto]] = field(default_factory=dict)
    dims: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    #: Values of the small tensors that constants and sizes decide. Each number is a constant, or a size of at least 1.
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    #: Tensors whose values depend on the values of inputs, and not on their sizes alone.
    data: set[str] = field(default_factory=set)

    def add_types(self, name: str, types: Sequence[TypeProto]) -> None:
        self.types[name] = list(types)
        self.dims[name] = [tuple(dim.dim_value for dim in found.tensor_type.shape.dim) for found in types]

    def add_constant(self, name: str, tensor: TensorProto) -> None:
        count = len(self.batches.pairs)
        self.add_types(name, [helper.make_tensor_type_proto(tensor.data_type, tensor.dims)] * count)
        if math.prod(tensor.dims) <= _ELEMENTS_MAX:
            self.values[name] = [numpy_helper.to_array(tensor)] * count

    def axis(self, name: str, axis: int) -> list[int]:
        """Return the size of one axis in each batch."""
        return [dims[axis] for dims in self.dims[name]]

    def varying_axes(self, name: str) -> list[int]:
        """Return the axes whose size varies with the batch."""
        first, *others = self.dims[name]
        return [axis for axis, size in enumerate(first) if any(dims[axis] != size for dims in others)]

    def value_varies(self, name: str) -> bool:
        """Whether a known value varies with the batch."""
        first, *others = self.values.get(name, [None])
        return any(value is not first for value in others) and bool(np.any(_varying(self.values[name])))

    def bytes_of(self, name: str) -> list[int]:
        """Return a tensor's bytes in each batch; a size of 0 counts as 1, so that none beside it is without a bound."""
        return [math.prod(max(1, size) for size in dims) * self.itemsize(name) for dims in self.dims[name]]

    def itemsize(self, name: str) -> int:
        """Return the bytes of one of a tensor's numbers."""
        return helper.tensor_dtype_to_np_dtype(self.types[name][0].tensor_type.elem_type).itemsize


def add_value(node: NodeProto, known: KnownTensors, version: int) -> None:
    """Compute the value of a small integer tensor in each batch, if it follows from known ones."""
    if node.op_type == "Constant" or len(node.output) != 1:
        return
    (output,) = node.output
    if known.varying_axes(output) or math.prod(known.dims[output][0]) > _ELEMENTS_MAX:
        return
    names = [name for name in node.input if name]
    if node.op_type in {"Shape", "Size"}:
        varies = bool(known.varying_axes(names[0]))
        given = [{names[0]: np.broadcast_to(np.int8(0), dims)} for dims in known.dims[names[0]]]
    else:
        if any(name not in known.values for name in names):
            return
        varies = any(known.value_varies(name) for name in names)
        given = [{name: known.values[name][batch] for name in names} for batch in range(len(known.batches.pairs))]
        if not (_stays_convex(node, known) if varies else _is_plain(node, given[0])):
            return
    try:
        found = _evaluated(node, given if varies else given[:1], version)
    except Exception:  # noqa: BLE001 - what cannot be computed is not known, and refused where it is a size
        return
    if varies and any(np.any(value >= _SIZE_MAX) for value in found):
        return
    found = found if varies else found * len(given)
    if all(v.dtype.kind in "iub" and v.shape == dims for v, dims in zip(found, known.dims[output], strict=True)):
        known.values[output] = found


def _evaluated(node: NodeProto, given: Sequence[Mapping[str, np.ndarray]], version: int) -> list[np.ndarray]:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in given[0].items()
    ]
    graph = helper.make_graph([node], "size", inputs, [helper.make_empty_tensor_value_info(node.output[0])])
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)]))
    with np.errstate(all="ignore"):
        return [np.asarray(evaluator.run(None, dict(values))[0]) for values in given]  # type: ignore[index]


def _varying(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return which numbers of a value vary with the batch."""
    varying: np.ndarray = np.any(np.stack(values) != values[0], axis=0)
    return varying


def _is_plain(node: NodeProto, values: Mapping[str, np.ndarray]) -> bool:
    """Whether every runtime computes the same of these constants: a few operators, and integers."""
    return node.op_type in CONSTANT_VALUES and all(value.dtype.kind in "iub" for value in values.values())


def _stays_convex(node: NodeProto, known: KnownTensors) -> bool:
    """Whether each number of the node's value is a constant or a sum of products again (see `batches`)."""
    if node.op_type not in VARYING_VALUES:
        return False
    places = VARYING_VALUES[node.op_type]
    if any(known.value_varies(n) for i, n in enumerate(node.input) if places is not None and i not in places):
        return False
    operands = [known.values[n] for i, n in enumerate(node.input) if n and (places is None or i in places)]
    if any(value.dtype.kind not in "iu" for value, *_ in operands):
        return False
    match node.op_type:
        case "Cast":
            return all(a.i in _WIDE_INTEGERS for a in node.attribute if a.name == "to")
        case "Equal":
            return _never_equal(*operands)
        case "Add" | "Mul" | "Sum" | "Max":
            bounds = [max(float(np.max(value, initial=2)) for value in values) for values in operands]
        case "ReduceProd" | "ReduceSum" | "ReduceMax":
            bounds = [max(float(np.prod(np.maximum(value, 2).astype(np.float64))) for value in operands[0])]
        case _:
            return True  # it only moves numbers
    return all(np.all(value >= 0) for values in operands for value in values) and math.prod(bounds) < _SIZE_MAX


def _never_equal(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    """Whether each number that varies, and so is at least 1, meets a constant below 1: exporters ask for -1."""
    pairs = (first, second), (second, first)
    return all(np.all(~_varying(one) | (~_varying(other) & (other[0] < 1))) for one, other in pairs)
