from __future__ import annotations

from math import log
from types import SimpleNamespace

import numpy as np
import pytest

from model_store.bundle.stability import Observation, distance, drifts, heads_moved, moved_by, stability_index
from model_store.bundle.statistics import Distribution, Statistics

#: Half of the values are below 0.5.
HALVES = Distribution(edges=(0.5,), shares=(0.5, 0.5), low=0.0, high=1.0, mean=0.5)
#: A quarter of these are. The index of that against HALVES: the difference of each share times the log of their ratio.
QUARTER = [0.1, 0.6, 0.7, 0.8]
QUARTER_AGAINST_HALVES = -0.25 * log(0.5) + 0.25 * log(1.5)


def manifest(*heads):
    return SimpleNamespace(heads=[SimpleNamespace(name=name) for name in heads])


def observation(*columns, **inputs):
    return Observation(np.array(columns, np.float32).T, {name: np.array(values) for name, values in inputs.items()})


@pytest.mark.parametrize(
    ("expected", "found", "index"),
    [
        pytest.param([0.5, 0.5], [0.5, 0.5], 0.0, id="the same"),
        pytest.param([2, 2], [1, 3], QUARTER_AGAINST_HALVES, id="counts are taken as shares"),
        pytest.param([1, 3], [2, 2], QUARTER_AGAINST_HALVES, id="the other way round is as far"),
        pytest.param([1, 1], [0, 4], (1e-4 - 0.5) * log(2e-4) + 0.5 * log(2), id="an empty part found"),
        pytest.param([0, 4], [1, 1], (1e-4 - 0.5) * log(2e-4) + 0.5 * log(2), id="an empty part expected"),
    ],
)
def test_the_index_is_the_sum_over_the_parts(expected, found, index):
    assert stability_index(np.array(expected), np.array(found)) == pytest.approx(index)


def test_values_are_compared_by_the_parts_of_the_reference():
    assert distance(HALVES, np.array(QUARTER)) == pytest.approx(QUARTER_AGAINST_HALVES)
    assert distance(HALVES, np.array([*QUARTER, np.nan, np.inf])) == pytest.approx(QUARTER_AGAINST_HALVES)
    assert distance(HALVES, np.array([np.nan])) == 0.0


def test_values_are_compared_by_the_parts_of_other_values():
    # Of two distinct values each is a part of its own, and nothing is below the first.
    index = moved_by(np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0, 1.0, np.nan]))
    assert index == pytest.approx(QUARTER_AGAINST_HALVES)
    assert moved_by(np.array(QUARTER), np.array([np.nan])) == 0.0
    assert moved_by(np.array([np.nan]), np.array(QUARTER)) == 0.0


TRAINED = Statistics(rows=4, inputs={"pins.age": HALVES, "pins.size": HALVES}, heads={"hide": HALVES})


def test_drift_is_told_of_each_head_and_input_that_has_statistics():
    lately = [
        observation([0.1], [0.1], **{"pins.age": [0.1, 0.2]}),
        observation([0.1, 0.1, 0.1], [0.6, 0.7, 0.8], **{"pins.age": [0.8, 0.9], "pins.other": [0.5]}),
    ]
    assert drifts(manifest("save", "hide"), TRAINED, lately) == {
        ("head", "hide"): pytest.approx(QUARTER_AGAINST_HALVES),
        ("input", "pins.age"): 0.0,
    }


def test_no_drift_is_told_without_statistics_or_observations():
    assert drifts(manifest("hide"), None, [observation([0.1])]) == {}
    assert drifts(manifest("hide"), TRAINED, []) == {}


def test_heads_of_both_models_are_compared_by_name():
    own = (manifest("save", "hide"), [observation([0.0], [0.0]), observation([0.0] * 3, [1.0] * 3)])
    other = (manifest("hide", "like"), [observation([0.0, 0.0], [1.0] * 2), observation([1.0, 1.0], [1.0] * 2)])
    assert heads_moved(own, other) == {"hide": pytest.approx(QUARTER_AGAINST_HALVES)}


def test_a_model_that_predicted_nothing_has_not_moved():
    heads = manifest("hide")
    assert heads_moved((heads, []), (heads, [observation([0.5])])) == {}
    assert heads_moved((heads, [observation([0.5])]), (heads, [])) == {}
