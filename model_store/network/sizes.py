"""Bound the memory of a run: how large each tensor of a network becomes with the largest batch.

A size that is counted in a caller's data has no bound that a proof could find, so every size must follow from constants
and from the sizes of the inputs. Of these it must be made by sums, products, maxima and exact quotients: then three
batches show the largest memory of all (`batches`). The walk computes the sizes of each node's results in these. It
refuses what it cannot follow, and so needs no list of all the ways in which a network could hide a size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from kernels.engine import ROW_REQUEST, TensorSpec
from model_store.network.batches import Batches
from model_store.network.einsum_sizes import INPUTS_MAX, elements_between
from model_store.network.known_tensors import KnownTensors, add_value
from model_store.network.operator_sizes import (
    CLIPPING,
    COUNTING,
    DIVIDING,
    FOLLOWING,
    MAY_VARY,
    REFUSED,
    SIZED,
    VARYING_VALUES,
)

NODES_MAX = 100_000
#: Limit on each number that decides a size, so that no product of them wraps around.
_NUMBER_MAX = 1 << 31
#: Operators that take the largest int64 for "up to the end".
_OPEN_ENDED = frozenset({"Constant", "Shape", "Slice"})
#: Functions of the standard without shape inference. The result is as large as the first input.
_LIKE_FIRST = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
_LABELS = rb" *(?:[A-Za-z] *)*(?:\.\.\. *(?:[A-Za-z] *)*)?"
_EQUATION = re.compile(_LABELS + rb"(?:," + _LABELS + rb")*(?:->" + _LABELS + rb")?")
#: Recurrent operators, with the products of a step that runtimes compute for all steps at once.
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


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
    total = [sum(sizes) for sizes in zip(*held.values(), strict=True)] or [0] * len(known.batches.pairs)
    ending: dict[int, list[str]] = {}
    for name, place in last_use.items():
        ending.setdefault(place, []).append(name)
    for place, plain in enumerate(graph.node):
        node = _with_all_steps(plain, place)
        _infer(node, known, version)
        made = {name: known.bytes_of(name) for name in node.output if name}
        held |= made
        total = [sum(sizes) for sizes in zip(total, *made.values(), strict=True)]
        if node.op_type == "Einsum" or node.op_type in _GATES:
            _check_scratch(node, known, total, limits)
        if max(total) > limits.bytes_max:
            batch = total.index(max(total))
            rows, requests = known.batches.pairs[batch]
            of = "one request" if requests == 1 else f"{requests:,} requests"
            largest = max(held, key=lambda name: held[name][batch])
            raise NetworkError(
                f"{where(node)}: a run of {rows:,} rows (candidates_max) of {of} holds "
                f"{total[batch]:,} bytes here, the limit is {limits.bytes_max:,} (swap.run_bytes_max); the largest "
                f"tensor is {largest!r} with the shape {list(known.dims[largest][batch])}"
            )
        for name in (*ending.get(place, ()), *(name for name in made if name not in last_use)):
            if name in held:
                total = [before - ended for before, ended in zip(total, held.pop(name), strict=True)]


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
    if operator in REFUSED or not (operator in SIZED or operator in DIVIDING or operator in FOLLOWING):
        raise NetworkError(f"{where(node)}: operator {operator} is not allowed")


def _check_scratch(node: NodeProto, known: KnownTensors, total: Sequence[int], limits: RunLimits) -> None:
    """Refuse an operator that holds too much while it computes."""
    if node.op_type == "Einsum":
        if len(node.input) > INPUTS_MAX:
            inputs = len(node.input)
            raise NetworkError(f"{where(node)}: an Einsum of {inputs} inputs, the limit is {INPUTS_MAX}; split it")
        equation = next(a.s for a in node.attribute if a.name == "equation").decode()
        fix = f"a product of some inputs of {equation!r} is that large; split it into two or more, of two inputs each"
    else:
        fix = "all gates of all steps are that large; shorten its sequence, or make it narrower"
    for batch, (rows, requests) in enumerate(known.batches.pairs):
        if node.op_type == "Einsum":  # once as it is made, once as the next product takes it
            elements = 2 * elements_between(equation, [known.dims[name][batch] for name in node.input])
            itemsize = helper.tensor_dtype_to_np_dtype(known.types[node.output[0]][0].tensor_type.elem_type).itemsize
            scratch = elements * itemsize
        else:
            scratch = _GATES[node.op_type] * known.bytes_of(node.output[0])[batch]
        holds = total[batch] + scratch
        if holds > limits.bytes_max:
            raise NetworkError(
                f"{where(node)}: a run of {rows:,} rows (candidates_max) of {requests:,} requests holds {holds:,} "
                f"bytes here, the limit is {limits.bytes_max:,} (swap.run_bytes_max): {fix}"
            )


def _check_equation(node: NodeProto) -> None:
    """Refuse an equation that is none. onnx's shape inference never returns from some of them."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    if not _EQUATION.fullmatch(equation):
        raise NetworkError(f"{where(node)}: {equation[:80]!r} is no equation of an Einsum, such as 'nd,nd->n'")


def _with_all_steps(node: NodeProto, place: int) -> NodeProto:
    """Return a recurrent node with a name for its first output, the states of all steps: runtimes make it anyway."""
    if node.op_type not in _GATES or (node.output and node.output[0]):
        return node
    whole = NodeProto()
    whole.CopyFrom(node)
    del whole.output[:]
    whole.output.extend([f"all steps of node {place}", *node.output[1:]])
    return whole


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
    """Return what is known before the first node: the inputs in each batch, and the weights."""
    known = KnownTensors(Batches.up_to(limits.rows))
    specs = {spec.name: spec for spec in (*inputs, TensorSpec(ROW_REQUEST, "candidate", "int64", ()))}
    for value in graph.input:
        spec = specs.get(value.name)
        if spec is None:
            raise NetworkError(f"the network takes an input {value.name!r}, which the manifest does not declare")
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        counts = [rows if spec.side == "candidate" else requests for rows, requests in known.batches.pairs]
        known.add_types(value.name, [helper.make_tensor_type_proto(dtype, [n, *spec.shape]) for n in counts])
        known.data.add(value.name)
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
