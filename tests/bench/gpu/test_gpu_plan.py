"""The plan of a run on a GPU: no clock, no process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.gpu.plan import (
    COMPILED,
    FOUR_MINUTES,
    PHASES,
    TEN_MINUTES,
    TILE_ROWS,
    TUNED_SHAPES,
    PlanError,
    expected,
    plan,
    tuning_name,
)
from bench.gpu.predicted import predictions
from kernels.gpu.tiles import Launch


def test_the_ten_minute_run_starts_each_phase_when_it_should_and_ends_within_480_s():
    planned = plan(TEN_MINUTES, "out")
    assert {phase.name: phase.starts_at_s for phase in planned} == {
        "facts": 0, "parity": 15, "ceilings": 75, "encoder": 85, "tuning": 125, "ncu": 195, "sanitizer": 235,
        "engine": 265, "two-engines": 335, "served": 350, "public": 425, "table": 460,
    }  # fmt: skip
    assert planned[-1].ends_at_s == sum(phase.limit_s for phase in planned) == 480


@pytest.mark.parametrize("names", [TEN_MINUTES, FOUR_MINUTES, ("table", "engine"), ("parity",)])
def test_phases_keep_their_order_and_none_takes_the_next_ones_time(names):
    planned = plan(names, "out")
    assert [phase.name for phase in planned] == [name for name in PHASES if name in names]
    assert planned[0].starts_at_s == 0
    ends_s = [phase.ends_at_s for phase in planned]
    assert [phase.starts_at_s for phase in planned[1:]] == ends_s[:-1]
    assert all(phase.limit_s == PHASES[phase.name].limit_s > 0 for phase in planned)


def test_the_rerun_ends_within_240_s_and_has_what_its_table_compares_with():
    planned = plan(FOUR_MINUTES, "out")
    assert planned[-1].ends_at_s <= 240
    assert {"facts", "parity", "ceilings", "encoder", "engine", "table"} == {phase.name for phase in planned}


@pytest.mark.parametrize(
    ("names", "why"), [(("parity", "pariti"), "no phase 'pariti'; use one of facts, "), (("ncu", "ncu"), "named twice")]
)
def test_a_phase_that_is_unknown_or_named_twice_is_refused(names, why):
    with pytest.raises(PlanError, match=why):
        plan(names, "out")


def test_a_dry_run_has_the_same_phases_and_says_so_to_each():
    dry, real = plan(TEN_MINUTES, "there", dry_run=True), plan(TEN_MINUTES, "there")
    assert [phase.command for phase in dry] == [(*phase.command, "--dry-run") for phase in real]
    assert all(phase.command[1:] == ("-m", "bench.gpu.phase", phase.name, "--out", "there") for phase in real)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_every_number_has_a_name_of_its_own(phase, dry_run):
    names = expected(phase, dry_run=dry_run)
    assert len(set(names)) == len(names)
    assert bool(names) is (phase != "table")


def test_the_documentation_names_every_phase_and_when_it_starts_at_the_latest():
    page = (Path(__file__).parents[3] / "docs" / "gpu.md").read_text()
    told = re.findall(r"^\| `([a-z-]+)` \| (\d+) s \|", page, re.MULTILINE)
    assert told == [(phase.name, f"{phase.starts_at_s:g}") for phase in plan(TEN_MINUTES, "out")]
    (rerun_s,) = re.findall(r"# the rerun, (\d+) s at most", page)
    assert int(rerun_s) == plan(FOUR_MINUTES, "out")[-1].ends_at_s


def test_predictions_are_of_numbers_that_are_measured():
    predicted = predictions()
    for phase, names in predicted.items():
        assert set(names) <= set(expected(phase))
        assert all(0 < low <= high for low, high in names.values())
    assert {"64 x 256", "64 x 512"} < set(predicted["encoder"])


def test_every_way_to_compile_the_kernel_is_predicted_and_its_own_comes_first():
    assert COMPILED[0] == (Launch().block, Launch().warps)
    predicted = predictions()["tuning"]
    assert {tuning_name(TUNED_SHAPES[0], compiled, TILE_ROWS[0]) for compiled in COMPILED} <= set(predicted)
