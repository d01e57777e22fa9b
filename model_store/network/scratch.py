"""What operators hold while they compute, beside their inputs and results: Einsum, and recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from onnx import NodeProto

from model_store.network.errors import NetworkError, where
from model_store.network.known_tensors import KnownTensors

#: Recurrent operators, with the products of a step that runtimes compute for all steps at once.
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
#: Inputs of an Einsum. Beyond so many there are too many orders to look at.
_INPUTS_MAX = 8
_ELLIPSIS = "..."


def with_all_steps(node: NodeProto, place: int) -> NodeProto:
    """Return a recurrent node with a name for its first output, the states of all steps: runtimes make it anyway."""
    if node.op_type not in _GATES or (node.output and node.output[0]):
        return node
    whole = NodeProto()
    whole.CopyFrom(node)
    del whole.output[:]
    whole.output.extend([f"all steps of node {place}", *node.output[1:]])
    return whole


def scratch_of(node: NodeProto, known: KnownTensors) -> tuple[list[int], str]:
    """Return the bytes in each batch, and what to do about too many. Raises NetworkError if they cannot be told."""
    if node.op_type in _GATES:
        steps = known.bytes_of(node.output[0])
        fix = "all gates of all steps are that large; shorten its sequence, or make it narrower"
        return [_GATES[node.op_type] * size for size in steps], fix
    if node.op_type != "Einsum":
        return [0] * len(known.batches.pairs), ""
    if len(node.input) > _INPUTS_MAX:
        raise NetworkError(
            f"{where(node)}: an Einsum of {len(node.input)} inputs, the limit is {_INPUTS_MAX}; split it"
        )
    equation = next(a.s for a in node.attribute if a.name == "equation").decode()
    fix = f"a product of some inputs of {equation!r} is that large; split it into two or more, of two inputs each"
    shapes = zip(*(known.dims[name] for name in node.input), strict=True)
    # Once as it is made, once as the next product takes it.
    return [2 * elements_between(equation, batch) * known.itemsize(node.output[0]) for batch in shapes], fix


def elements_between(equation: str, dims: Sequence[Sequence[int]]) -> int:
    """Return the elements of the largest product of some of an Einsum's inputs, before the others are multiplied.

    Runtimes multiply them two at a time, in any order.

    A label is summed over once no other input and not the result has it. With fewer than three inputs nothing lies in
    between, and the result is 0.

    Args:
        equation: of operands that fit it, as shape inference has checked: `nld,nd,de->ne`.
        dims: the inputs' shapes.
    """
    operands, arrow, result = equation.replace(" ", "").partition("->")
    labels = [_labels(operand, len(shape)) for operand, shape in zip(operands.split(","), dims, strict=True)]
    sizes: dict[str, int] = {}
    for own, shape in zip(labels, dims, strict=True):
        for label, size in zip(own, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    if not arrow:  # the result has the labels that occur once
        result = "".join(label for label in sizes if operands.count(label) == 1)
    kept = {label for label in sizes if label in result or label.startswith(_ELLIPSIS)}
    largest = 0
    for count in range(2, len(labels)):
        for chosen in combinations(range(len(labels)), count):
            needed = kept.union(*(own for place, own in enumerate(labels) if place not in chosen))
            made = needed.intersection(label for place in chosen for label in labels[place])
            largest = max(largest, math.prod(sizes[label] for label in made))
    return largest


def _labels(operand: str, rank: int) -> list[str]:
    """Return a label for each axis: its letter, or its place from the right among those that `...` stands for."""
    before, _, after = operand.partition(_ELLIPSIS)
    places = reversed(range(rank - len(before) - len(after)))
    return [*before, *(f"{_ELLIPSIS}{place}" for place in places), *after]
