from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.bundle.golden import GoldenRequest, decode_golden, encode_golden
from model_store.bundle.tensor_sources import RECENCY_NAMES, Recency, TensorInput
from model_store.model.assembly import Assembler
from model_store.model.recency import log2_1p, recency, recency_of_ages
from tests import tiny

NOW_MS, HOUR_MS, DAY_MS = tiny.READ_MS, 3_600_000, 86_400_000


def columns(*ages_ms):
    """Return the columns of a user with actions of these ages, newest first."""
    return dict(zip(RECENCY_NAMES, recency(NOW_MS - np.array(ages_ms, np.int64), NOW_MS), strict=True))


def test_the_columns_are_the_age_and_the_counts():
    found = columns(7_000, HOUR_MS, HOUR_MS + 1, DAY_MS, 6 * DAY_MS, 8 * DAY_MS)
    # log2 of 1 + 7 s, and of 1 + 2 actions within an hour, which is half way from 2 to 4.
    assert found == {"newest_age": 3.0, "last_hour": 1.5, "last_day": 2.25, "last_week": 2.5}


def test_who_never_acted_is_like_who_did_so_a_year_ago():
    never = columns()
    assert never == columns(400 * DAY_MS)
    assert never["newest_age"] > columns(364 * DAY_MS)["newest_age"]
    assert [never[name] for name in RECENCY_NAMES[1:]] == [0, 0, 0]


def test_an_action_of_the_next_millisecond_has_no_age():
    assert columns(-5) == {"newest_age": 0.0, "last_hour": 1.0, "last_day": 1.0, "last_week": 1.0}


@pytest.mark.parametrize("number", [0, 1, 3, 7, 1023])
def test_powers_of_two_have_their_logarithm(number):
    assert log2_1p(number) == math.log2(1 + number)


@given(st.lists(st.integers(0, 500 * DAY_MS), max_size=20))
def test_ages_in_training_give_what_times_give_in_serving(ages_ms):
    ages_ms = np.sort(np.array(ages_ms, np.int64) // 1000 * 1000)  # seconds, which float32 holds
    padded = np.concatenate([ages_ms / 1000, np.full(3, np.inf)]).astype(np.float32)[None]
    expected = np.array(recency(NOW_MS - ages_ms, NOW_MS), np.float32)
    # Above 2^24 s, float32 rounds the seconds.
    np.testing.assert_allclose(recency_of_ages(padded)[0], expected, rtol=1e-6)


def test_it_is_of_the_time_at_which_the_features_were_read():
    inputs = (*tiny.manifest().inputs, TensorInput(name="recency", source=Recency()))
    assembler = Assembler(tiny.manifest().model_copy(update={"inputs": inputs}))
    fetched = tiny.fetched([1, 2], [4, 5])
    times_ms = NOW_MS - np.array([3_000, HOUR_MS + 1])
    fetched.events["time_ms"] = times_ms
    for read_ms, expected in ((NOW_MS, [2.0, 1.0, 1.5, 1.5]), (NOW_MS + DAY_MS, [None, 0.0, 0.0, 1.5])):
        (found,) = assembler.assemble(replace(fetched, read_ms=read_ms), "home").request["recency"].tolist()
        assert found[1:] == expected[1:]
        assert expected[0] in (None, found[0])


def test_golden_requests_keep_the_time_of_the_read():
    fetched = tiny.fetched([1, 2], [4, 5])
    (kept,) = decode_golden(encode_golden([GoldenRequest(fetched, "home", np.zeros((2, 2), np.float32))]))
    assert kept.fetched.read_ms == fetched.read_ms == NOW_MS


def test_a_model_without_a_sequence_cannot_read_it():
    manifest = tiny.manifest().model_copy(update={"sequence": None, "sequence_length": 0})
    with pytest.raises(KeyError, match="declares no sequence"):
        manifest.spec(TensorInput(name="recency", source=Recency()))
