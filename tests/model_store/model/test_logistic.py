from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels.native.library import library_if_built
from model_store.model import logistic
from model_store.model.logistic import Logistic, exp
from tests.bits import equal_to_the_bit

FLOATS = st.floats(width=32)


def test_exp_is_within_one_unit_in_the_last_place():
    x = np.random.default_rng(0).uniform(-80, 80, 1_000_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(exp(x) - exact) < np.spacing(exact.astype(np.float32)))
    assert exp(np.zeros(1, np.float32)) == 1


def test_probabilities_are_those_of_the_logistic_function():
    logits = np.random.default_rng(0).normal(0, 10, (10_000, 3)).astype(np.float32)
    slopes, intercepts = np.array([0.5, 1, 2], np.float32), np.array([-1, 0, 3], np.float32)
    found = Logistic(slopes, intercepts)(logits)
    exact = 1 / (1 + np.exp(-(slopes * logits + intercepts).astype(np.float64)))
    assert np.abs(found - exact).max() < 2e-7
    assert found.dtype == np.float32


@given(st.data(), st.integers(0, 200), st.integers(1, 70))
def test_native_and_numpy_give_the_same_bits(data, rows, heads):
    assert library_if_built() is not None
    logits = data.draw(hnp.arrays(np.float32, (rows, heads), elements=FLOATS))
    slopes = data.draw(hnp.arrays(np.float32, heads, elements=st.floats(2**-20, 2**20, width=32)))
    intercepts = data.draw(hnp.arrays(np.float32, heads, elements=st.floats(-100, 100, width=32)))
    calibrated = Logistic(slopes, intercepts)
    assert equal_to_the_bit(calibrated(logits), calibrated.reference(logits))


def test_every_kind_of_logit_gives_the_same_bits():
    logits = np.arange(0, 2**32, 65_521).astype(np.uint32).view(np.float32)[:, None]
    calibrated = Logistic(np.ones(1, np.float32), np.zeros(1, np.float32))
    found = calibrated(logits)
    assert equal_to_the_bit(found, calibrated.reference(logits))
    assert np.array_equal(np.isnan(found), ~np.isfinite(logits))


def test_logits_that_are_not_adjacent_are_calibrated_too():
    logits = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    calibrated = Logistic(np.ones(3, np.float32), np.zeros(3, np.float32))
    assert equal_to_the_bit(calibrated(logits[:, ::2]), calibrated(logits[:, ::2].copy()))


def test_with_the_library_numpy_computes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Logistic, "reference")
    assert (
        Logistic(np.ones(1, np.float32), np.zeros(1, np.float32))(np.zeros((2, 1), np.float32)).tolist() == [[0.5]] * 2
    )


def test_without_the_library_numpy_calibrates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logistic, "_native", lambda: None)
    calibrated = Logistic(np.ones(1, np.float32), np.zeros(1, np.float32))
    assert calibrated(np.zeros((2, 1), np.float32)).tolist() == [[0.5], [0.5]]
