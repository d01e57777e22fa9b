from __future__ import annotations

from dataclasses import replace

import pytest

from bench.fuzz import fuzz_atomic
from bench.harness import whole
from ranker.data.atomic.recbole import read_atomic
from tests.ranker import recbole_files


def test_a_quick_fuzz_of_atomic_files_finds_nothing() -> None:
    raw = whole(fuzz_atomic.measure(quick=True))
    assert all(claim.holds for claim in fuzz_atomic.conclude(raw).claims)
    assert raw["failures"] == []


def test_a_reader_that_reads_otherwise_is_found_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_later(folder):
        dataset = read_atomic(folder)
        return replace(dataset, time_ms=dataset.time_ms + 1)

    monkeypatch.setattr(recbole_files, "read_atomic", one_later)
    raw = whole(fuzz_atomic.measure(quick=True))
    assert [claim.holds for claim in fuzz_atomic.conclude(raw).claims][:2] == [False, False]
    assert "AssertionError" in raw["failures"][0]
    assert "inter=b'" in raw["failures"][0]
