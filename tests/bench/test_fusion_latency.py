from __future__ import annotations

import pytest

from bench.engines.fusion_latency import BASE, DEFAULT, SUBJECT, conclude, measure
from bench.harness import whole


def test_untrained_variants_are_served_in_turn_and_compared() -> None:
    raw = whole(measure(quick=True))
    assert set(raw["latency_ms"]) == {BASE, DEFAULT, SUBJECT}
    assert all(len(found) == 3 and min(found) > 0 for rounds in raw["latency_ms"].values() for found in rounds)
    assert len(conclude(raw).claims) == 3


def test_the_latency_added_is_the_median_of_rounds() -> None:
    latency_ms = {BASE: [[2.0], [4.0], [1.0]], DEFAULT: [[2.2], [4.0], [2.0]], SUBJECT: [[3.0], [4.4], [9.0]]}
    usual, required, aimed = conclude({"candidates": 128, "latency_ms": latency_ms}).claims
    assert usual.measured == pytest.approx(10.0)
    assert required.measured == aimed.measured == 50.0
    assert (usual.holds, required.holds, aimed.holds) == (True, True, False)
