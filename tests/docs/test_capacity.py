"""The numbers of docs/capacity.md, worked from results short enough to work by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import capacity_tables

CAPACITY = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "A Processor", "commit": "0123456789ab"},
    "summary": {
        "500 candidates, core-ms a request": 12.5,
        "500 candidates, of it beyond the engine's runs": 1.5,
        "500 candidates, rows/s a core": 40_000.0,
        "memory of its own, MB": 180.0,
        "pages of mapped files, MB": 85.0,
    },
    "raw": {
        "setup": {
            "instructions": "avx2", "cores": 2, "engine": "openvino", "streams": 2, "near_cache_bytes": 64_000_000,
            "memory_at_start": {"own_bytes": 150e6, "file_bytes": 80e6},
        },
        "rounds": [{"500": {}}],
    },
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "capacity.json").write_text(json.dumps(CAPACITY))
    return tmp_path


def test_the_cores_of_the_example_are_rate_times_core_milliseconds(results: Path) -> None:
    assert capacity_tables.cores_needed(results).splitlines()[2:] == [
        "| at 100% of every core | 1,000 x 12.50 core-ms / 1,000 | 12.5 |"
    ]


def test_a_share_that_answers_in_time_divides_them(results: Path) -> None:
    summary = {"goodput at the loose deadline, requests/s": 400.0, "saturated, requests/s": 500.0}
    (results / "serving.json").write_text(json.dumps({"summary": summary}))
    last = capacity_tables.cores_needed(results).splitlines()[-1]
    assert last.endswith("| 12.5 / 0.80 of the saturated rate | 15.6 |")


@pytest.mark.parametrize("goodput", [0.0, None])
def test_a_server_that_holds_no_rate_gives_no_share(results: Path, goodput: float | None) -> None:
    summary = {"goodput at the loose deadline, requests/s": goodput, "saturated, requests/s": 500.0}
    (results / "serving.json").write_text(json.dumps({"summary": summary}))
    assert len(capacity_tables.cores_needed(results).splitlines()) == 3


def test_every_table_is_of_one_measurement_or_says_that_there_is_none(results: Path, tmp_path: Path) -> None:
    assert "A Processor (avx2), 2 cores" in capacity_tables.measured_on(results)
    assert "| 500 | 12.50 | 1.50 | 40,000 |" in capacity_tables.by_candidates(results)
    assert "| of its own, after the largest requests | 180 MB |" in capacity_tables.memory(results)
    for table in capacity_tables.TABLES.values():
        assert table(tmp_path / "nowhere").startswith("Not measured yet")
