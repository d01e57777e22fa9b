"""What an Einsum holds in between is what the worst order of products makes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.network.scratch import elements_between

SIZES = {"a": 2, "b": 3, "c": 5, "d": 7, "e": 11}
labels = partial(st.lists, st.sampled_from(sorted(SIZES)), max_size=3)


def products(operands, result):
    """Yield the sizes of all products that any order of pairwise contractions makes before the last."""
    if len(operands) == 2:
        return
    for one in range(len(operands)):
        for other in range(one):
            rest = [operand for place, operand in enumerate(operands) if place not in {one, other}]
            made = "".join(sorted(set(operands[one] + operands[other]) & set("".join([*rest, result]))))
            arrays = [np.ones([SIZES[label] for label in operands[place]]) for place in (one, other)]
            yield np.einsum(f"{operands[one]},{operands[other]}->{made}", *arrays).size
            yield from products([*rest, made], result)


@given(st.lists(labels().map("".join), min_size=3, max_size=4), labels(unique=True))
@settings(deadline=None, max_examples=60)
def test_the_bound_is_the_largest_product_of_any_order(operands, result):
    result = "".join(label for label in result if label in "".join(operands))
    shapes = [[SIZES[label] for label in operand] for operand in operands]
    assert elements_between(f"{','.join(operands)}->{result}", shapes) == max(products(operands, result))


@pytest.mark.parametrize(
    ("equation", "shapes", "largest"),
    [
        ("nld,nd,de->ne", [(7, 3, 5), (7, 5), (5, 2)], 7 * 5 * 2),
        ("ab, bc, ca -> a", [(5, 6), (6, 7), (7, 5)], 5 * 6 * 7),
        ("ab,bc,cd", [(2, 3), (3, 5), (5, 7)], 2 * 3 * 5 * 7),  # the result has a and d, by default
        ("...a,a,b->...b", [(4, 3, 2), (2,), (9,)], 4 * 3 * 2 * 9),
        ("...a,...a,...->...", [(4, 1, 2), (3, 2), (4, 3)], 4 * 3 * 2),  # axes of `...` meet from the right
        ("ab,bc->ac", [(1_000, 1_000), (1_000, 1_000)], 0),
    ],
)
def test_labels_are_read_as_runtimes_read_them(equation, shapes, largest):
    assert elements_between(equation, shapes) == largest
