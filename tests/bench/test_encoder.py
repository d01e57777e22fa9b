from __future__ import annotations

import json

import numpy as np

from bench.engines.encoder import conclude, inversion_count, measure
from bench.harness import whole


def test_the_script_measures_every_side_and_finds_them_equal() -> None:
    raw = whole(measure(quick=True))
    rates = raw["rows_per_s_by_round"]
    assert {
        "encoder, serving form in the engine, 128 candidates",
        "ranker, published form in OpenVINO, 128 candidates",
    } < set(rates)
    assert all(rate > 0 for rounds in rates.values() for rate in rounds)
    by_name = {claim.name: claim for claim in conclude(raw).claims}
    assert by_name["largest difference from float64, fp32 sides"].holds
    assert by_name["rows ranked above one that they belong below, beyond ties"].holds
    json.dumps(raw)


def test_only_neighbours_further_apart_than_a_tie_are_inversions() -> None:
    expected = np.array([[0.5], [0.5 + 1e-6], [0.1], [0.3]])
    assert inversion_count(expected, expected) == 0
    assert inversion_count(np.array([[2.0], [1.0], [0.2], [0.3]]), expected) == 0
    assert inversion_count(np.array([[2.0], [1.0], [0.3], [0.2]]), expected) == 1
