from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from loadtest.open_loop import DROPPED, OK, STAGES, Samples
from loadtest.report import Percentiles, summarise, table


def samples(latency_ms: list[float], statuses: list[str], degraded: list[bool] | None = None) -> Samples:
    count = len(statuses)
    stages = np.tile(np.arange(len(STAGES), dtype=np.uint32) * 1000, (count, 1))
    return Samples(
        np.arange(count) / 10,
        np.zeros(count),
        np.array(latency_ms, np.float64) / 1e3,
        tuple(statuses),
        stages,
        tuple(("pins_missing",) if d else () for d in degraded or [False] * count),
        ("tiny@1",),
        0.25,
    )


def test_percentiles_are_those_of_the_raw_values():
    values = np.random.default_rng(0).lognormal(size=1234)
    found = Percentiles.of(values)
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx(np.percentile(values, [50, 90, 99]))
    assert found.max == values.max()
    assert Percentiles.of(np.empty(0)) is None


def test_goodput_counts_only_undegraded_answers_within_the_target():
    summary = summarise(
        samples(
            [1, 10, 10.1, 2, 3, 1, float("nan")],
            [OK, OK, OK, OK, OK, "RESOURCE_EXHAUSTED", DROPPED],
            [False, False, False, True, False, False, False],
        ),
        duration_s=2.0,
        target_ms=10.0,
    )
    assert summary.goodput_per_s == 1.5
    assert summary.offered_per_s == 3.5
    assert summary.achieved_per_s == 2.5
    assert summary.degraded == 1
    assert summary.statuses == {OK: 5, "RESOURCE_EXHAUSTED": 1, DROPPED: 1}
    assert summary.latency_ms is not None
    assert summary.latency_ms.max == pytest.approx(10.1)
    assert summary.stage_ms == {stage: float(i) for i, stage in enumerate(STAGES)}
    assert summary.generator_cores == 0.25


def test_answers_after_the_window_lower_the_achieved_rate():
    summary = summarise(samples([0, 3_900], [OK, OK]), duration_s=1.0, target_ms=10.0)
    assert summary.offered_per_s == 2
    assert summary.achieved_per_s == pytest.approx(2 / 4.0)


@pytest.mark.parametrize("statuses", [[], [DROPPED], ["UNAVAILABLE", "UNAVAILABLE"]])
def test_a_run_without_answers_has_a_summary_and_a_table(statuses):
    summary = summarise(samples([float("nan")] * len(statuses), statuses), duration_s=1.0, target_ms=10.0)
    assert summary.latency_ms is None
    assert summary.goodput_per_s == summary.achieved_per_s == 0
    Console(file=io.StringIO()).print(table(summary, "nothing"))
    json.dumps(summary.as_json(), allow_nan=False)


def test_summary_is_plain_json_and_the_table_shows_it():
    summary = summarise(samples([1, 2], [OK, "UNAVAILABLE"]), duration_s=1.0, target_ms=10.0)
    assert json.loads(json.dumps(summary.as_json(), allow_nan=False)) == summary.as_json()
    console = Console(file=io.StringIO(), record=True, width=120)
    console.print(table(summary, "load"))
    text = console.export_text()
    assert "UNAVAILABLE" in text
    assert "1 (50.00%)" in text
    assert "goodput" in text
