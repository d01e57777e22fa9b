"""Bound the memory of a run: how large each tensor of a network becomes with the largest batch.

A size that is counted in a caller's data has no bound that a proof could find, so every size must follow from constants
and from the sizes of the inputs, and grow with these: then it is largest with the largest batch. The walk computes the
sizes of each node's results with that batch. It refuses what it cannot follow, and so needs no list of all the ways in
which a network could hide a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from kernels.engine import ROW_REQUEST, TensorSpec
from model_store.bundle.known_tensors import KnownTensors, add_value
from model_store.bundle.operator_sizes import (
    COUNTING,
    FOLLOWING,
    GROWING_VALUES,
    MAY_GROW,
    REFUSED,
    SIZED,
    WINDOWED,
)

NODES_MAX = 100_000
#: Limit on each number that decides a size, so that no product of them wraps around.
_NUMBER_MAX = 1 << 31
#: Operators that take the largest int64 for "up to the end".
_OPEN_ENDED = frozenset({"Constant", "Shape", "Slice"})
#: Functions of the standard without shape inference. The result is as large as the first input.
_LIKE_FIRST = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
_STRETCH = helper.make_attribute("keep_aspect_ratio_policy", "stretch")


class NetworkError(Exception):
    """A network contains something that servers refuse. The message names the node or tensor."""


@dataclass(frozen=True, slots=True)
class RunLimits:
    """The largest run that a network must be fit for.

    Attributes:
        rows: candidates; a run may have as many requests as rows.
        bytes_max: limit on the tensors that the run holds at once, without the weights.
    """

    rows: int = 5_000
    bytes_max: int = 2 << 30


def check_sizes(model: ModelProto, inputs: Sequence[TensorSpec], limits: RunLimits) -> None:
    """Refuse a network whose largest run has no bound, or one above the limit.

    Args:
        model: a network of known operators, of which no function is recursive.
        inputs: its inputs, by the manifest.
        limits: the largest run.

    Raises:
        NetworkError: names the operator and the tensor.
    """
    graph = _inlined(model).graph
    opsets = {imported.domain: imported.version for imported in model.opset_import}
    version = opsets.get("", opsets.get("ai.onnx", 1))
    known = _given(graph, inputs, limits)
    last_use = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last_use |= {output.name: len(graph.node) for output in graph.output}
    weights = {tensor.name for tensor in graph.initializer}
    held = {name: known.bytes_of(name) for name in known.types if name not in weights}
    total = sum(held.values())
    ending: dict[int, list[str]] = {}
    for name, place in last_use.items():
        ending.setdefault(place, []).append(name)
    for place, node in enumerate(graph.node):
        _infer(node, known, version)
        made = {name: known.bytes_of(name) for name in node.output if name}
        held |= made
        total += sum(made.values())
        if total > limits.bytes_max:
            largest = max(held, key=held.__getitem__)
            raise NetworkError(
                f"{where(node)}: a run of {limits.rows:,} rows (candidates_max) holds {total:,} bytes here, the limit "
                f"is {limits.bytes_max:,} (swap.run_bytes_max); the largest tensor is {largest!r} with the shape "
                f"{known.dims(largest)}"
            )
        for name in (*ending.get(place, ()), *(name for name in made if name not in last_use)):
            total -= held.pop(name, 0)


def where(node: NodeProto) -> str:
    """Name a node for a message."""
    return f"node {node.name or node.op_type!r}"


def check_operator(node: NodeProto) -> None:
    """Refuse an operator of the standard that the tables refuse, or do not know."""
    operator = node.op_type
    if operator in COUNTING:
        raise NetworkError(
            f"{where(node)}: operator {operator} is not allowed: the size of tensor {next(iter(node.output), '')!r} "
            "would be counted in a request's data, so that a request could make a run of any size"
        )
    if operator in REFUSED or not (operator in SIZED or operator in WINDOWED or operator in FOLLOWING):
        raise NetworkError(f"{where(node)}: operator {operator} is not allowed")


def _inlined(model: ModelProto) -> ModelProto:
    """Return the network without functions. Functions that call others twice each would grow without bound."""
    if not model.functions:
        return model
    sizes: dict[tuple[str, str], int] = {}
    functions = {(f.domain, f.name): f for f in model.functions}

    def size(nodes: Sequence[NodeProto]) -> int | None:
        called = [(node.domain, node.op_type) for node in nodes]
        if any(key in functions and key not in sizes for key in called):
            return None
        return sum(sizes.get(key, 1) for key in called)

    while len(sizes) < len(functions):  # none is recursive, so each round finds one
        found = {key: size(f.node) for key, f in functions.items() if key not in sizes}
        sizes |= {key: count for key, count in found.items() if count is not None}
    if (count := size(model.graph.node) or 0) > NODES_MAX:
        raise NetworkError(f"the network has {count:,} nodes with its functions' own, the limit is {NODES_MAX:,}")
    try:
        return inline_local_functions(model)
    except Exception as error:  # whatever onnx's C++ raises for functions that do not fit their calls
        raise NetworkError(f"its functions cannot be inlined: {error}") from error


def _given(graph: GraphProto, inputs: Sequence[TensorSpec], limits: RunLimits) -> KnownTensors:
    """Return what is known before the first node: the inputs with the largest batch, and the weights."""
    known = KnownTensors()
    specs = {spec.name: spec for spec in (*inputs, TensorSpec(ROW_REQUEST, "candidate", "int64", ()))}
    for value in graph.input:
        spec = specs.get(value.name)
        if spec is None:
            raise NetworkError(f"the network takes an input {value.name!r}, which the manifest does not declare")
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        known.types[value.name] = helper.make_tensor_type_proto(dtype, [limits.rows, *spec.shape])
        known.data.add(value.name)
        known.varying.add(value.name)
    if graph.sparse_initializer:
        raise NetworkError("the network has sparse weights; store them as plain tensors")
    for tensor in graph.initializer:
        if tensor.name in known.types:
            raise NetworkError(f"tensor {tensor.name!r} is defined twice")
        known.add_constant(tensor.name, tensor)
    return known


def _infer(node: NodeProto, known: KnownTensors, version: int) -> None:
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
    _check_shrinking(node, known)
    _add_types(node, known, version)
    outputs = [name for name in node.output if name]
    sizing = {name for place, name in enumerate(node.input) if place in SIZED.get(operator, ())}
    if operator in {"Shape", "Size"}:
        add_value(node, known, version)
        return
    if any(name in known.varying or (name in known.growing and name in sizing) for name in node.input):
        known.varying.update(outputs)
    if any(name in known.data for name in node.input):
        known.data.update(outputs)
    elif not known.varying.intersection(outputs):
        add_value(node, known, version)


def _check_size_inputs(node: NodeProto, known: KnownTensors) -> None:
    """Refuse a size that is not known, or that may shrink with the batch."""
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
                f"{', '.join(sorted(GROWING_VALUES))}"
            )
        if name in known.growing and place not in MAY_GROW.get(node.op_type, ()):
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
            numbers += known.values[node.input[place]].ravel().tolist()
    beyond = [number for number in numbers if not abs(number) < _NUMBER_MAX]
    if beyond:
        raise NetworkError(f"{where(node)}: {beyond[0]:,} is no size for {node.op_type}, the limit is {_NUMBER_MAX:,}")


def _check_shrinking(node: NodeProto, known: KnownTensors) -> None:
    """Refuse results that may be larger for a smaller batch: what is found with the largest would be no bound."""
    if shrinking := _shrinking(node, known):
        raise NetworkError(
            f"{where(node)}: a {node.op_type} with {shrinking} may make more of a smaller batch, so that the size of "
            f"tensor {node.output[0]!r} has no bound"
        )


def _shrinking(node: NodeProto, known: KnownTensors) -> str:
    """Say what may make more of a smaller batch; empty if nothing may."""
    operator, inputs = node.op_type, [*node.input]
    attributes = {a.name: a for a in node.attribute}
    if operator in WINDOWED or operator == "STFT":
        return "a window that varies" if any(name in known.varying for name in inputs[1:]) else ""
    second = inputs[1] if len(inputs) > 1 else ""
    if second in known.growing:
        if operator == "Reshape" and not ("allowzero" in attributes and attributes["allowzero"].i):
            return "a shape that varies with the batch, but without allowzero=1,"
        if operator == "Range" and not (np.all(known.values[inputs[0]] >= 0) and np.all(known.values[inputs[2]] > 0)):
            return "a start below 0 or a step that is not above 0"
    if not inputs or inputs[0] not in known.varying:
        return ""
    match operator:
        case "Squeeze" if not second and "axes" not in attributes:
            return "no axes"
        case "Split" if not second and "split" not in attributes:
            return "no sizes of the parts"
        case "Slice" if _slices_both_ends(node, known):
            return "one end counted from the start and one from the end"
        case "Resize" if attributes.get("keep_aspect_ratio_policy", _STRETCH).s != _STRETCH.s:
            return "a fixed aspect ratio"
    return ""


def _slices_both_ends(node: NodeProto, known: KnownTensors) -> bool:
    if len(node.input) < 3:  # opset 9 has attributes
        given = {a.name: list(a.ints) for a in node.attribute}
        starts, ends, steps = given.get("starts", []), given.get("ends", []), []
    else:
        values = [known.values[name].ravel().tolist() if name else [] for name in node.input[1:]]
        starts, ends, steps = values[0], values[1], values[3] if len(values) > 3 else []
    longest = max(known.dims(node.input[0]), default=0)
    for start, end, step in zip(starts, ends, steps or [1] * len(starts), strict=False):
        if step > 0 and start < 0 <= end < longest:
            return True
        if step < 0 and 0 <= start < longest and -longest < end < 0:
            return True
    return False


def _add_types(node: NodeProto, known: KnownTensors, version: int) -> None:
    if node.op_type == "Constant":
        known.add_constant(node.output[0], _constant(node))
        return
    if node.op_type in _LIKE_FIRST:
        found = {node.output[0]: known.types[node.input[0]]}
    else:
        given = {name: known.types[name] for name in node.input if name}
        data = {name: numpy_helper.from_array(known.values[name], name) for name in given if name in known.values}
        try:
            schema = onnx.defs.get_schema(node.op_type, version)
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, given, data, opset_imports=[helper.make_opsetid("", version)]
            )
        except Exception as error:  # whatever onnx's C++ raises for inputs that do not fit each other
            raise NetworkError(f"{where(node)}: its inputs do not fit {node.op_type}: {_first_line(error)}") from error
    for name in node.output:
        if name:
            known.types[name] = _certain(node, name, found.get(name))


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
