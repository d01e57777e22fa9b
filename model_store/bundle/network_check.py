"""What a network file may hold, checked before any runtime sees it: standard operators over weights of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

#: Operators of ONNX that no ranker needs and that make a run's time, memory or result unforeseeable: loops and
#: branches, randomness, sequences and strings.
_REFUSED = frozenset(
    {
        "Loop",
        "Scan",
        "If",
        "SequenceMap",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SplitToSequence",
        "ConcatFromSequence",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "StringNormalizer",
        "StringConcat",
        "StringSplit",
        "RegexFullMatch",
        "TfIdfVectorizer",
        "ImageDecoder",
    }
)
#: Operators whose second input, or attribute, says how large their result is.
_SIZED = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
NODES_MAX = 100_000
#: Elements of one tensor that the file itself makes: 1 GiB of float32.
ELEMENTS_MAX = 1 << 28
_STANDARD = ("", "ai.onnx")


class NetworkError(Exception):
    """A network holds what a server does not run; the message names the node or tensor."""


def check_network(content: bytes) -> ModelProto:
    """Parse a network file and refuse what it must not hold.

    Raises:
        NetworkError: no ONNX; weights in other files; an operator that ONNX does not know, or that `_REFUSED` names; a
            function that calls itself; a tensor that says of itself that it is larger than its data, or too large.
    """
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise NetworkError(f"no ONNX network: {error}") from error
    if not model.graph.node:
        raise NetworkError("no ONNX network: it has no nodes")
    functions = {(f.domain, f.name): f for f in model.functions}
    opsets = {imported.domain: imported.version for imported in model.opset_import}
    count = 0
    for nodes, imports in (
        (model.graph.node, opsets),
        *((f.node, {i.domain: i.version for i in f.opset_import} or opsets) for f in model.functions),
    ):
        for node in _nodes(nodes):
            count += 1
            if count > NODES_MAX:
                raise NetworkError(f"more than {NODES_MAX} nodes")
            _check_operator(node, imports, functions)
    _check_recursion(functions)
    constants: dict[str, TensorProto] = {}
    for tensor in _tensors(model):
        _check_tensor(tensor)
        constants[tensor.name] = tensor
    for nodes in (model.graph.node, *(f.node for f in model.functions)):
        for node in _nodes(nodes):
            _check_result_size(node, constants)
    return model


def _check_operator(node: NodeProto, imports: dict[str, int], functions: dict[tuple[str, str], FunctionProto]) -> None:
    where = f"node {node.name or node.op_type!r}"
    if node.domain in _STANDARD:
        if node.op_type in _REFUSED:
            raise NetworkError(f"{where}: operator {node.op_type} is not run here")
        version = imports.get("", imports.get("ai.onnx", 0))
        if not onnx.defs.has(node.op_type, domain="", max_inclusive_version=version or 1):
            raise NetworkError(f"{where}: ONNX knows no operator {node.op_type} in opset {version}")
    elif (node.domain, node.op_type) not in functions:
        raise NetworkError(
            f"{where}: unknown operator {node.domain}.{node.op_type}; a network brings its own functions' definitions"
        )


def _check_recursion(functions: dict[tuple[str, str], FunctionProto]) -> None:
    calls = {
        key: {(n.domain, n.op_type) for n in _nodes(f.node) if (n.domain, n.op_type) in functions}
        for key, f in functions.items()
    }
    while calls:  # take away those that call nobody who is left; what remains goes in circles
        leaves = {key for key, called in calls.items() if not called & calls.keys()}
        if not leaves:
            raise NetworkError(f"functions call each other in a circle: {sorted('.'.join(key) for key in calls)}")
        calls = {key: called for key, called in calls.items() if key not in leaves}


def _check_tensor(tensor: TensorProto) -> None:
    name = tensor.name or "without a name"
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise NetworkError(f"tensor {name}: its data lies in another file; a bundle's network holds all of its weights")
    if any(dim < 0 for dim in tensor.dims):
        raise NetworkError(f"tensor {name}: negative size {list(tensor.dims)}")
    elements = math.prod(tensor.dims)
    if elements > ELEMENTS_MAX:
        raise NetworkError(f"tensor {name}: {elements:,} elements, the limit is {ELEMENTS_MAX:,}")
    if tensor.data_type == TensorProto.STRING:
        raise NetworkError(f"tensor {name} holds text; networks compute with numbers")
    try:
        onnx.numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise NetworkError(f"tensor {name}: {list(tensor.dims)} is not what its data holds: {error}") from error


def _check_result_size(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    place = _SIZED.get(node.op_type)
    if place is None or node.domain not in _STANDARD or len(node.input) <= place:
        return
    sizes = constants.get(node.input[place])
    if sizes is None:  # computed from the batch, which admission bounds
        return
    elements = math.prod(max(1, int(size)) for size in onnx.numpy_helper.to_array(sizes).ravel())
    if elements > ELEMENTS_MAX:
        raise NetworkError(
            f"node {node.name or node.op_type!r}: makes {elements:,} elements, the limit is {ELEMENTS_MAX:,}"
        )


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield nodes and those of the graphs inside them."""
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
            tensor.name = node.output[0]  # a constant is known by what it gives
        yield tensor
    for sparse in (
        *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
        *attribute.sparse_tensors,
    ):
        yield from (sparse.values, sparse.indices)
