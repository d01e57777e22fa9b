"""What a node makes: the sizes, types and small values of its results, in each batch.

It refuses what it cannot follow, and so needs no list of all the ways in which a network could hide a size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from model_store.network.errors import NetworkError, where
from model_store.network.known_tensors import KnownTensors, add_value
from model_store.network.operator_sizes import CLIPPING, DIVIDING, MAY_VARY, SIZED, VARYING_VALUES

#: Limit on each number that decides a size, so that no product of them wraps around.
_NUMBER_MAX = 1 << 31
#: Operators that take the largest int64 for "up to the end".
_OPEN_ENDED = frozenset({"Constant", "Shape", "Slice"})
#: Functions of the standard without shape inference. The result is as large as the first input.
_LIKE_FIRST = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
_LABELS = rb" *(?:[A-Za-z] *)*(?:\.\.\. *(?:[A-Za-z] *)*)?"
_EQUATION = re.compile(_LABELS + rb"(?:," + _LABELS + rb")*(?:->" + _LABELS + rb")?")


def infer(node: NodeProto, known: KnownTensors, version: int) -> None:
    """Add what is known of a node's results."""
    operator = node.op_type
    if node.domain not in {"", "ai.onnx"}:
        raise NetworkError(f"{where(node)}: the function {node.domain}.{operator} does not fit its call")
    if strangers := [name for name in node.input if name and name not in known.types]:
        raise NetworkError(f"{where(node)}: its input {strangers[0]!r} is not defined before it")
    if repeated := [name for name in node.output if name in known.types]:
        raise NetworkError(f"{where(node)}: tensor {repeated[0]!r} is defined twice")
    if any(a.type in {AttributeProto.GRAPH, AttributeProto.GRAPHS} for a in node.attribute):
        raise NetworkError(f"{where(node)}: operator {operator} has no subgraph")
    _check_size_inputs(node, known)
    _check_numbers(node, known)
    _check_varying(node, known)
    if operator == "Einsum":
        _check_equation(node)
    _add_types(node, known, version)
    if operator not in {"Shape", "Size"} and any(name in known.data for name in node.input):
        known.data.update(name for name in node.output if name)
    else:
        add_value(node, known, version)


def _check_size_inputs(node: NodeProto, known: KnownTensors) -> None:
    """Refuse a size that is not known, or varies where it must not."""
    for place in SIZED.get(node.op_type, ()):
        name = node.input[place] if place < len(node.input) else ""
        if not name:
            continue
        if name in known.data:
            raise NetworkError(
                f"{where(node)}: the size of what {node.op_type} makes is read from tensor {name!r}, which is computed "
                "from a request's data, so that a request could make a run of any size; compute it from constants and "
                "from the shapes of inputs"
            )
        if name not in known.values:
            raise NetworkError(
                f"{where(node)}: the size of what {node.op_type} makes is read from tensor {name!r}, whose largest "
                "value cannot be told; compute it from constants and shapes, with no operators but "
                f"{', '.join(sorted(VARYING_VALUES))}, and without numbers below 0"
            )
        if known.value_varies(name) and place not in MAY_VARY.get(node.op_type, ()):
            raise NetworkError(
                f"{where(node)}: input {place} of {node.op_type}, tensor {name!r}, varies with the batch, but must be "
                "a constant"
            )


def _check_numbers(node: NodeProto, known: KnownTensors) -> None:
    if node.op_type in _OPEN_ENDED:
        return
    numbers = [number for a in node.attribute for number in (a.i, *a.ints)]
    for place in SIZED.get(node.op_type, ()):
        if place < len(node.input) and node.input[place]:
            numbers += [number for value in known.values[node.input[place]] for number in value.ravel().tolist()]
    beyond = [number for number in numbers if not abs(number) < _NUMBER_MAX]
    if beyond:
        raise NetworkError(f"{where(node)}: {beyond[0]:,} is no size for {node.op_type}, the limit is {_NUMBER_MAX:,}")


def _check_varying(node: NodeProto, known: KnownTensors) -> None:
    """Refuse inputs that vary with the batch where the result's size would not be made by sums and products."""
    operator, names = node.op_type, [name for name in node.input if name]
    if operator == "Range" and len(names) == 3 and known.value_varies(names[1]):
        start, _, step = (known.values[name][0] for name in names)
        if np.any(start > 0) or np.any(step != 1):
            raise _unbounded(node, names[1], "it varies with the batch, so start at 0 and count by 1")
    without_axes = len(names) == 1 and all(a.name != "axes" for a in node.attribute)
    if operator == "Squeeze" and without_axes and known.varying_axes(names[0]):
        raise _unbounded(node, names[0], "it varies with the batch; state the axes")
    if operator in CLIPPING or operator in DIVIDING:
        for name in names[1:]:
            if any(known.varying_axes(name)):  # any but the first axis
                raise _unbounded(node, name, f"axis {max(known.varying_axes(name))} varies with the batch")


def _unbounded(node: NodeProto, name: str, why: str) -> NetworkError:
    return NetworkError(
        f"{where(node)}: the size of what {node.op_type} makes of tensor {name!r} has no bound that can be told: {why}"
    )


def _add_types(node: NodeProto, known: KnownTensors, version: int) -> None:
    if node.op_type == "Constant":
        known.add_constant(node.output[0], _constant(node))
        return
    names = [name for name in node.input if name]
    sizing = {name for place, name in enumerate(node.input) if name and place in SIZED.get(node.op_type, ())}
    found: dict[object, Mapping[str, TypeProto]] = {}
    keys: list[object] = []
    for batch in range(len(known.batches.pairs)):
        values = {name: known.values[name][batch] for name in sizing}
        key = (*(known.dims[name][batch] for name in names), *(value.tobytes() for value in values.values()))
        if key not in found:
            found[key] = _inferred(node, {name: known.types[name][batch] for name in names}, values, version)
        keys.append(key)
    for name in node.output:
        if name:
            known.add_types(name, [_certain(node, name, found[key].get(name)) for key in keys])
    if len(found) > 1 and (node.op_type in CLIPPING or node.op_type in DIVIDING):
        _check_passed_on(node, known)
    if node.op_type == "Reshape":
        _check_reshape(node, known)
    for name in node.output:
        if name and len(found) > 1:
            _check_alike(node, name, known)


def _inferred(
    node: NodeProto, types: dict[str, TypeProto], values: Mapping[str, np.ndarray], version: int
) -> Mapping[str, TypeProto]:
    if node.op_type in _LIKE_FIRST:
        return {node.output[0]: types[node.input[0]]}
    data = {name: numpy_helper.from_array(value, name) for name, value in values.items()}
    try:
        schema = onnx.defs.get_schema(node.op_type, version)
        return onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=[helper.make_opsetid("", version)]
        )
    except Exception as error:  # whatever onnx's C++ raises for inputs that do not fit each other
        raise NetworkError(f"{where(node)}: its inputs do not fit {node.op_type}: {_first_line(error)}") from error


def _check_alike(node: NodeProto, name: str, known: KnownTensors) -> None:
    """Refuse a tensor that has other axes, or no elements, in some batches only."""
    if len({len(dims) for dims in known.dims[name]}) > 1 or any(
        min(known.axis(name, axis)) < 1 for axis in known.varying_axes(name)
    ):
        shapes = " or ".join(str(list(dims)) for dims in dict.fromkeys(known.dims[name]))
        raise _unbounded(node, name, f"it is {shapes}, depending on the batch")


def _check_passed_on(node: NodeProto, known: KnownTensors) -> None:
    """Refuse an axis that varies with the batch and does not come out of the operator as it is."""
    first = next(name for name in node.input if name)
    rank = len(known.dims[first][0])
    for place, output in enumerate(node.output):
        alike = output and all(len(dims) == rank for dims in known.dims[output])
        if (place == 0 and not alike) or (
            alike and any(known.axis(output, axis) != known.axis(first, axis) for axis in known.varying_axes(first))
        ):
            raise _unbounded(node, first, "it changes an axis that varies with the batch; change constant ones only")


def _check_reshape(node: NodeProto, known: KnownTensors) -> None:
    """Refuse a Reshape that does not keep the number of elements, or infers a size of which no bound can be told.

    The size that -1 stands for is the number of elements divided by the other sizes. That is a sum of products again if
    the others are one product.
    """
    taken, made = known.dims[node.input[0]], known.dims[node.output[0]]
    for before, after in zip(taken, made, strict=True):
        if math.prod(before) != math.prod(after):
            raise NetworkError(f"{where(node)}: a Reshape cannot make {list(after)} of {list(before)}")
    if len(node.input) > 1 and node.input[1]:
        shape = known.values[node.input[1]][0].ravel().tolist()
    else:  # opset 4 and older
        shape = [size for a in node.attribute if a.name == "shape" for size in a.ints]
    if -1 in shape:
        others = [math.prod(size for axis, size in enumerate(dims) if axis != shape.index(-1)) for dims in made]
        if len(set(others)) > 1 and not known.batches.is_product(others):
            raise _unbounded(node, node.input[0], "-1 stands beside a sum that varies with the batch; state all sizes")


def _certain(node: NodeProto, name: str, found: TypeProto | None) -> TypeProto:
    if (
        found is None
        or not found.HasField("tensor_type")
        or not found.tensor_type.HasField("shape")
        or any(not dim.HasField("dim_value") or dim.dim_value < 0 for dim in found.tensor_type.shape.dim)
    ):
        raise NetworkError(
            f"{where(node)}: the size of tensor {name!r} cannot be told from constants and the sizes of "
            f"the inputs of {node.op_type}"
        )
    if found.tensor_type.elem_type in {TensorProto.UNDEFINED, TensorProto.STRING}:
        raise NetworkError(f"{where(node)}: tensor {name!r} does not hold numbers")
    return found


def _constant(node: NodeProto) -> TensorProto:
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return attribute.t
            case "value_int" | "value_ints":
                values = list(attribute.ints) if attribute.name.endswith("s") else attribute.i
                return numpy_helper.from_array(np.array(values, np.int64))
            case "value_float" | "value_floats":
                numbers = list(attribute.floats) if attribute.name.endswith("s") else attribute.f
                return numpy_helper.from_array(np.array(numbers, np.float32))
    raise NetworkError(f"{where(node)}: a Constant must be a tensor of numbers")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _check_equation(node: NodeProto) -> None:
    """Refuse an equation that is none. onnx's shape inference never returns from some of them."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    if not _EQUATION.fullmatch(equation):
        raise NetworkError(f"{where(node)}: {equation[:80]!r} is no equation of an Einsum, such as 'nd,nd->n'")
