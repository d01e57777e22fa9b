from __future__ import annotations

import itertools

import numpy as np
import pytest

from server.request.request_ids import Permutation, RequestIds

_LOW = (1 << 40) - 1


def keyed(key):
    """Bits of a process that draws 5 as its own 24, begins to count at 7, and has this key."""
    drawn = {24: 5, 40: 7, 256: key}
    return RequestIds(drawn.__getitem__)


def test_ids_of_one_process_differ_and_are_never_zero():
    ids = RequestIds()
    drawn = [ids.next() for _ in range(100_000)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 < one < 1 << 64 for one in drawn)
    assert len({one >> 40 for one in drawn}) == 1


def test_a_process_that_draws_zeros_has_no_id_zero():
    ids = RequestIds(lambda _: 0)
    assert {ids.next() >> 40 for _ in range(1_000)} == {1}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("key", [b"", b"one", b"another"])
def test_the_permutation_reaches_every_number_once(bits, key):
    numbers = np.arange(1 << bits)
    assert np.sort(Permutation(bits, key).of(numbers)).tolist() == numbers.tolist()


def test_the_counter_wraps_within_its_bits():
    drawn = {24: 5, 40: _LOW, 256: 1}
    wraps, follows = RequestIds(drawn.__getitem__), RequestIds((drawn | {40: 0}).__getitem__)
    first = {wraps.next() for _ in range(256)}
    second = {follows.next() for _ in range(256)}
    assert all(one >> 40 == 5 for one in first)
    assert len(first & second) == 255  # it begins one before, and goes on with 0


def test_ids_follow_from_the_key_alone():
    one, same, other = keyed(1), keyed(1), keyed(2)
    drawn = [one.next() for _ in range(1_000)]
    assert [same.next() for _ in range(1_000)] == drawn
    assert not set(drawn) & {other.next() for _ in range(1_000)}


def test_the_next_id_does_not_follow_from_the_one_before():
    ids = keyed(1)
    drawn = [ids.next() & _LOW for _ in range(10_000)]
    steps = {(later - earlier) & _LOW for earlier, later in itertools.pairwise(drawn)}
    assert len(steps) == len(drawn) - 1
    # Each of the 40 bits changes in about half of the steps, as those of random numbers do: 5,000, give or take 50.
    changed = np.array([earlier ^ later for earlier, later in itertools.pairwise(drawn)])
    share = np.array([np.count_nonzero(changed >> bit & 1) for bit in range(40)]) / len(changed)
    assert share.min() > 0.47
    assert share.max() < 0.53
