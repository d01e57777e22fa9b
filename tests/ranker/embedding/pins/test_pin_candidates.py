from __future__ import annotations

import numpy as np
import pytest

from ranker.embedding.pins.candidates import SampleSettings, candidates
from ranker.embedding.pins.inputs import PinInputs

PINS = 300


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    index = rng.integers(0, PINS, (PINS, 6))
    weights = np.sort(rng.random((PINS, 6)).astype(np.float32), axis=1)[:, ::-1].copy()
    weights[::7, 3:] = 0  # some pins have three neighbours, some none
    weights[::11] = 0
    return PinInputs(np.arange(PINS, dtype=np.uint64), np.zeros((PINS, 1), np.float32), index, weights)


def test_few_pins_are_all_candidates(inputs):
    settings = SampleSettings(all_max=PINS)
    pins, log_drawn = candidates(inputs, np.array([3]), np.array([3, 4]), settings, np.random.default_rng(0))
    assert pins.tolist() == list(range(PINS))
    assert not log_drawn.any()


def test_a_sample_stands_for_all_pins(inputs):
    """Sums over the samples, each pin divided by its probability, are the sum over all pins, within 3 sigma."""
    settings = SampleSettings(all_max=10, uniform=20, hard=15)
    rng = np.random.default_rng(5)
    values = np.exp(rng.standard_normal((3, PINS)))
    values[1] *= np.arange(PINS) < 30  # the popular ones
    values[2] *= np.arange(PINS) >= 270
    sums = []
    for _ in range(4_000):
        needed = (PINS * rng.random(24) ** 3).astype(np.int64)
        pins, log_drawn = candidates(inputs, needed[:16], needed, settings, rng)
        assert np.isin(needed, pins).all()
        assert len(np.unique(pins)) == len(pins) <= 59
        sums.append(values[:, pins] @ np.exp(-log_drawn.astype(np.float64)))
    means, errors = np.mean(sums, axis=0), np.std(sums, axis=0) / np.sqrt(len(sums))
    assert (np.abs(means - values.sum(axis=1)) < 3 * errors).all(), (means, values.sum(axis=1), errors)


def test_hard_pins_are_farther_neighbours_of_those_that_ask(inputs):
    settings = SampleSettings(all_max=10, uniform=1, hard=2_000)
    asking = np.array([1, 7, 11])  # six neighbours, three, none
    pins, log_drawn = candidates(inputs, asking, asking, settings, np.random.default_rng(0))
    expected = {*asking.tolist(), *inputs.index[1, 3:].tolist(), *inputs.index[7, 1:3].tolist()}
    assert expected <= set(pins.tolist())
    assert len(pins) <= len(expected) + 1
    assert not log_drawn[np.isin(pins, list(expected))].any()
