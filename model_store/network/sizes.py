"""Bound the memory of a run: how large each tensor of a network becomes with the largest batch.

A size that is counted in a caller's data has no bound that a proof could find, so every size must follow from constants
and from the sizes of the inputs. Of these it must be made by sums, products, maxima and exact quotients: then three
batches show the largest memory of all (`batches`). The walk computes the sizes of each node's results in these
(`results`), and of what it holds meanwhile (`scratch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper
from onnx.inliner import inline_local_functions

from kernels.engine import ROW_REQUEST, TensorSpec
from model_store.network.batches import Batches
from model_store.network.errors import NetworkError, where
from model_store.network.known_tensors import KnownTensors
from model_store.network.operator_sizes import COUNTING, DIVIDING, FOLLOWING, REFUSED, SIZED
from model_store.network.results import infer
from model_store.network.scratch import scratch_of, with_all_steps

NODES_MAX = 100_000


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
        node = with_all_steps(plain, place)
        infer(node, known, version)
        made = {name: known.bytes_of(name) for name in node.output if name}
        held |= made
        total = [sum(sizes) for sizes in zip(total, *made.values(), strict=True)]
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
    scratch, fix = scratch_of(node, known)
    for (rows, requests), held, more in zip(known.batches.pairs, total, scratch, strict=True):
        if more and held + more > limits.bytes_max:
            raise NetworkError(
                f"{where(node)}: a run of {rows:,} rows (candidates_max) of {requests:,} requests holds "
                f"{held + more:,} bytes here, the limit is {limits.bytes_max:,} (swap.run_bytes_max): {fix}"
            )


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
