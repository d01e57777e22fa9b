from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.engines.lift import COURSES, Course, Subject, conclude, measure
from bench.harness import BenchmarkError, run, whole
from tests.ranker.interactions import write_atomic

TOY = Course("toy", "toy", "save")
SUBJECTS = {name: Subject(name) for name in ("base", "late", "early")}


def test_the_script_trains_evaluates_and_serves_and_writes_its_table(tmp_path: Path) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    raw, concluded = run(
        "lift",
        lambda: measure(quick=True, courses=(TOY,), subjects=SUBJECTS, data=tmp_path),
        conclude,
        tmp_path / "results",
    )
    latency_ms = raw["toy"]["latency_ms"]
    assert set(latency_ms) == set(SUBJECTS)
    assert all(value > 0 for values in latency_ms.values() for value in values)
    assert len(concluded.claims) == 6
    table = (tmp_path / "results" / "lift.md").read_text()
    assert "| `early` |" in table
    assert "save" in table
    assert (tmp_path / "results" / "lift.svg").read_bytes().startswith(b"<?xml")
    assert [path.name for path in tmp_path.iterdir() if path.name not in {"toy", "results"}] == []


def test_a_dataset_that_is_not_there_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    lost = replace(COURSES[1])
    with pytest.raises(BenchmarkError, match="pinrank data deskdrop SOURCE --out"):
        whole(measure(quick=True, courses=(lost,), data=tmp_path))
