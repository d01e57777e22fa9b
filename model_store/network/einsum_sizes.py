"""Bound what an Einsum of three or more inputs holds in between: runtimes contract them two at a time, in any order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

#: Beyond so many inputs there are too many orders to look at.
INPUTS_MAX = 8
_ELLIPSIS = "..."


def elements_between(equation: str, dims: Sequence[Sequence[int]]) -> int:
    """Return the elements of the largest product of some of the inputs, before the others are multiplied.

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
