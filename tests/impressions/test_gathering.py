"""The native collection of answers' pins equals the one in NumPy to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from impressions.writing import gathering
from impressions.writing.batches import impressions_batch
from impressions.writing.gathering import gather, gather_in_numpy
from impressions.writing.rows import Constants
from tests.impressions.answers import CONSTANTS, ToyScores, answered


@st.composite
def requests(draw):
    """Answers of several models, in any order, cut to their best, some with trimmed candidates."""
    found = []
    for number in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(1, 9))
        heads, parties, attributes = (draw(st.integers(least, 3)) for least in (1, 1, 0))
        random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        returned, scored = draw(st.integers(1, rows)), draw(st.integers(1, rows))
        values = random.normal(size=(rows, heads + parties + attributes + 1))
        values[random.random(values.shape) < 0.2] = draw(st.sampled_from([np.nan, np.inf, -0.0]))
        scores = ToyScores(
            random.permutation(rows)[:returned],
            values[:, -1].astype(np.float32),
            np.ascontiguousarray(values[:, :heads], np.float32),
            np.ascontiguousarray(values[:, heads : heads + parties]),
        )
        names = [tuple(f"{kind}{i}" for i in range(count)) for kind, count in (("h", heads), ("p", parties))]
        constants = Constants("home", "m@1", "d", "u", *names, tuple(f"a{i}" for i in range(attributes)))
        found.append(
            answered(
                number + 1, rows, scores=scores, constants=constants, party_weights=np.ones(parties),
                attribute_values=np.ascontiguousarray(values[:scored, heads + parties : -1].T),
            )
        )  # fmt: skip
    return found


@given(requests())
def test_both_ways_give_the_same_bits(answers):
    ours, reference = gather(answers), gather_in_numpy(answers)
    for name in ("pin_ids", "places", "probabilities", "party_utilities", "attributes", "utilities"):
        one, other = getattr(ours, name), getattr(reference, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("way", [gather, gather_in_numpy])
@pytest.mark.parametrize("place", [-1, 5])
def test_a_position_outside_the_request_is_refused_and_named(way, place):
    right = answered(1)
    order = right.scores.order.copy()
    order[2] = place
    scores = ToyScores(order, right.scores.utilities, right.scores.probabilities, right.scores.party_utilities)
    with pytest.raises(ValueError, match="request 7: its order has a position that it does not have"):
        way([right, answered(7, scores=scores)])


def test_without_the_library_numpy_does_it(monkeypatch):
    monkeypatch.setattr(gathering, "_native", lambda: None)
    (row,) = impressions_batch([answered(3)]).to_pylist()
    assert row["pin_ids"] == answered(3).pin_ids[answered(3).scores.order].tolist()
    assert row["heads"] == list(CONSTANTS.heads)
