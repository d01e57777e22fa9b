from __future__ import annotations

from bench.engines.fusion_latency import BASE, LOWER, SUBJECT, conclude, measure
from bench.harness import whole
from kernels.encoder import has_instruction


def test_untrained_variants_are_served_in_turn_and_compared() -> None:
    raw = whole(measure(quick=True))
    lower = {LOWER} if has_instruction("bf16") else set()
    assert set(raw["latency_ms"]) == {BASE, SUBJECT} | lower
    assert all(len(found) == 3 and min(found) > 0 for rounds in raw["latency_ms"].values() for found in rounds)
    assert len(conclude(raw).claims) == 2 + 2 * len(lower)


def test_the_latency_added_is_the_median_of_rounds() -> None:
    raw = {"candidates": 128, "latency_ms": {BASE: [[2.0], [4.0], [1.0]], SUBJECT: [[3.0], [4.4], [9.0]]}}
    required, aimed = conclude(raw).claims
    assert required.measured == aimed.measured == 50.0
    assert (required.holds, aimed.holds) == (True, False)
