"""Check an untrusted ONNX network before a runtime reads it: standard operators, weights in the file, bounded sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from kernels.engine import LOGITS, TensorSpec
from model_store.network.errors import NetworkError, where
from model_store.network.sizes import NODES_MAX, RunLimits, check_operator, check_sizes

#: Operators whose results are probabilities already.
_SQUASHING = frozenset({"Sigmoid", "HardSigmoid", "Softmax", "Hardmax"})
#: Operators that pass on what they get, in another shape or type.
_PASSING = frozenset(
    {"Identity", "Cast", "Clip", "Concat", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
FUNCTIONS_MAX = 1_000
#: Limit on the elements of a tensor that the file defines: 1 GiB of float32.
ELEMENTS_MAX = 1 << 28
_STANDARD = ("", "ai.onnx")
_DEFAULT = RunLimits()
__all__ = ["NetworkError", "RunLimits", "check_network"]


def check_network(content: bytes, inputs: Sequence[TensorSpec], limits: RunLimits = _DEFAULT) -> ModelProto:
    """Parse a network file and check it.

    Args:
        content: the file.
        inputs: the network's inputs, by the manifest.
        limits: the largest run that it must be fit for.

    Raises:
        NetworkError: the file is not ONNX; keeps weights in other files; uses an operator that is unknown or refused;
            has a recursive function, or one that replaces a standard operator; has a tensor that exceeds the limit or
            does not match its data; has a run without a bound, or beyond the limit; or ends in a sigmoid.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise NetworkError(f"not an ONNX network: {error}") from error
    if not model.graph.node:
        raise NetworkError("not an ONNX network: it has no nodes")
    _check_text(model)
    functions = _functions(model)
    opsets = {imported.domain: imported.version for imported in model.opset_import}
    count = 0
    for nodes, imports in (
        (model.graph.node, opsets),
        *((f.node, {i.domain: i.version for i in f.opset_import} or opsets) for f in model.functions),
    ):
        for node in _nodes(nodes):
            count += 1
            if count > NODES_MAX:
                raise NetworkError(f"the network has more than {NODES_MAX} nodes")
            _check_operator(node, imports, functions)
    _check_recursion(functions)
    for tensor in _tensors(model):
        _check_tensor(tensor)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise NetworkError(f"not a valid ONNX network: {error}") from error
    check_sizes(model, inputs, limits)
    _check_logits(model.graph)
    return model


def _check_text(model: ModelProto) -> None:
    """Refuse names that are not UTF-8: protobuf gives them as bytes, which no code expects."""
    names: list[object] = [imported.domain for imported in model.opset_import]
    for function in model.functions:
        names += [function.domain, function.name, *function.input, *function.output, *function.attribute]
        names += [imported.domain for imported in function.opset_import]
    for nodes in (model.graph.node, *(f.node for f in model.functions)):
        for node in _nodes(nodes):
            names += [node.domain, node.op_type, node.name, *node.input, *node.output]
            names += [attribute.name for attribute in node.attribute]
    names += [tensor.name for tensor in _tensors(model)]
    names += [value.name for value in (*model.graph.input, *model.graph.output)]
    for name in names:
        if not isinstance(name, str):
            raise NetworkError(f"the name {name!r} is not UTF-8")


def _functions(model: ModelProto) -> dict[tuple[str, str], FunctionProto]:
    """Return the functions that the file defines, by domain and name."""
    if len(model.functions) > FUNCTIONS_MAX:
        raise NetworkError(f"the network has {len(model.functions):,} functions, the limit is {FUNCTIONS_MAX:,}")
    functions: dict[tuple[str, str], FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name)
        if not function.domain or function.domain.startswith("ai.onnx"):  # runtimes differ in which one they take
            raise NetworkError(f"function {'.'.join(key)} stands in for an operator of the standard; rename its domain")
        if key in functions:
            raise NetworkError(f"function {'.'.join(key)} is defined twice")
        functions[key] = function
    return functions


def _check_logits(graph: GraphProto) -> None:
    """Refuse a network whose output `logits` holds probabilities: the server would take their sigmoid once more."""
    made_by = {name: node for node in graph.node for name in node.output}
    waiting, seen = [LOGITS], {LOGITS}
    while waiting:
        node = made_by.get(waiting.pop())
        if node is None or node.domain not in _STANDARD:
            continue
        if node.op_type in _SQUASHING:
            raise NetworkError(
                f"{where(node)}: the output {LOGITS!r} comes from a {node.op_type}, but must be "
                "logits: the server itself makes probabilities of them, by the calibration in the manifest, and those "
                f"of a network that ends in a sigmoid would all lie between 0.5 and 0.73; remove the {node.op_type}"
            )
        if node.op_type in _PASSING:
            new = [name for name in node.input if name not in seen]
            seen.update(new)
            waiting += new


def _check_operator(node: NodeProto, imports: dict[str, int], functions: dict[tuple[str, str], FunctionProto]) -> None:
    if node.domain in _STANDARD:
        version = imports.get("", imports.get("ai.onnx", 0))
        if not onnx.defs.has(node.op_type, domain="", max_inclusive_version=version or 1):
            raise NetworkError(f"{where(node)}: ONNX opset {version} has no operator {node.op_type}")
        check_operator(node)
    elif (node.domain, node.op_type) not in functions:
        raise NetworkError(
            f"{where(node)}: unknown operator {node.domain}.{node.op_type}; the network file must define its own "
            "functions"
        )


def _check_recursion(functions: dict[tuple[str, str], FunctionProto]) -> None:
    calls = {
        key: {(n.domain, n.op_type) for n in _nodes(f.node) if (n.domain, n.op_type) in functions}
        for key, f in functions.items()
    }
    while calls:  # remove functions that call no remaining one; what is left is recursive
        leaves = {key for key, called in calls.items() if not called & calls.keys()}
        if not leaves:
            raise NetworkError(f"functions call each other recursively: {sorted('.'.join(key) for key in calls)}")
        calls = {key: called for key, called in calls.items() if key not in leaves}


def _check_tensor(tensor: TensorProto) -> None:
    name = tensor.name or "(unnamed)"
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise NetworkError(f"tensor {name} has its data in another file; the network file must contain all weights")
    if any(dim < 0 for dim in tensor.dims):
        raise NetworkError(f"tensor {name} has a negative size: {list(tensor.dims)}")
    elements = math.prod(tensor.dims)
    if elements > ELEMENTS_MAX:
        raise NetworkError(f"tensor {name} has {elements:,} elements, the limit is {ELEMENTS_MAX:,}")
    if tensor.data_type == TensorProto.STRING:
        raise NetworkError(f"tensor {name} contains text; only numbers are allowed")
    try:
        onnx.numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise NetworkError(f"tensor {name}: its shape {list(tensor.dims)} does not match its data: {error}") from error


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield the nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(graph.node)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _tensors_of(model.graph)
    for function in model.functions:
        yield from _attribute_tensors(function.node)


def _tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _of_attribute(attribute, node)
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors_of(graph)


def _of_attribute(attribute: AttributeProto, node: NodeProto) -> Iterator[TensorProto]:
    for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
        if node.op_type == "Constant" and not tensor.name:
            tensor.name = node.output[0]  # other nodes refer to a constant by the name of its output
        yield tensor
    for sparse in (
        *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
        *attribute.sparse_tensors,
    ):
        yield from (sparse.values, sparse.indices)
