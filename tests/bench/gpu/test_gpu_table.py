"""The table of a run, from whatever lines there are."""

from __future__ import annotations

import json
import math

import pytest

from bench.gpu.numbers import Numbers, NumbersFile
from bench.gpu.plan import PHASES, expected
from bench.gpu.results import as_json, results
from bench.gpu.table import page, write
from bench.harness import read_claims

FAR_S = 1e9
CARD = {"phase": "facts", "what": "card", "name": "NVIDIA H100 80GB HBM3"}
PEAK = {"phase": "ceilings", "what": "bf16 product", "flop_s": 8e14}
FAST = {"phase": "encoder", "what": "64 x 512", "rows_s": 2e7, "ms_p50": 1.5, "ms_p99": 1.75}
LOST = {"phase": "encoder", "what": "64 x 512", "not_measured": "CompilationError: no"}
ENDED = {"phase": "encoder", "what": "the phase", "seconds": 40.0, "ended": "killed after 40 s"}
PREDICTED = {"encoder": {"64 x 512": (8e6, 13e6)}}


def found(*lines, dry_run=False):
    return results(NumbersFile(lines, 0), dry_run=dry_run)


def row(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_number_stands_beside_its_prediction_and_its_share_of_goal_and_peak():
    text = page(found(CARD, PEAK, FAST), PREDICTED)
    assert text.startswith("# NVIDIA H100 80GB HBM3\n")
    # 20M rows/s of 10M; of 4.1 MFLOP each 82 of 800 TFLOP/s; copies were not measured.
    assert row(text, "64 x 512") == ["64 x 512", "20,000,000", "8M to 13M", "2.00", "10.2%", "", "1.500", "1.750"]


@pytest.mark.parametrize("differences", [(0.002, float("nan")), (float("nan"), 0.002)])
def test_a_difference_that_is_no_number_is_the_largest_and_holds_nothing(tmp_path, differences):
    numbers = Numbers(tmp_path, "parity", FAR_S, dry_run=False)
    for what, difference in zip(("as it is", "block 64, 4 warps"), differences, strict=True):
        numbers.add(what, {"relative_difference": difference, "allowed": 0.01, "holds": difference <= 0.01})
    write(tmp_path, dry_run=False)
    (claim,) = read_claims(tmp_path)["gpu"]
    assert math.isnan(claim.measured)
    assert not claim.holds


def test_what_is_missing_says_why():
    text = page(found(CARD, FAST, ENDED), PREDICTED)
    assert row(text, "1 x 128")[1] == "not measured: killed after 40 s"
    assert row(text, "as it is")[1] == "not measured: the phase did not run to its end"
    assert row(text, "encoder: the phase")[1] == "killed after 40 s"


def test_a_phase_that_ended_well_without_a_number_is_told_apart():
    ended_well = {"phase": "ceilings", "what": "the phase", "seconds": 3.0}
    assert "Copies within its memory: not measured: the phase ended without it." in page(found(PEAK, ended_well), {})


@pytest.mark.parametrize("lines", [(FAST, LOST), (LOST, FAST)])
def test_a_number_that_was_measured_once_stays(lines):
    assert found(*lines).lines["encoder", "64 x 512"] == FAST


def test_the_last_of_two_measured_numbers_counts():
    again = {**FAST, "rows_s": 3e7}
    assert found(FAST, again).lines["encoder", "64 x 512"] == again


def test_a_dry_run_is_named_so_first_and_compared_with_nothing(tmp_path):
    dry = {**FAST, "what": "2 x 2", "dry_run": True}
    text = page(found({**PEAK, "dry_run": True}, dry, dry_run=True), {"encoder": {"2 x 2": (1.0, 2.0)}})
    assert text.startswith("# DRY RUN: not one number here means anything\n")
    assert row(text, "2 x 2")[2:6] == ["", "", "", ""]
    Numbers(tmp_path, "encoder", FAR_S, dry_run=True).add("2 x 2", {"rows_s": 1e9})
    write(tmp_path, dry_run=True)
    assert {file.name for file in tmp_path.iterdir()} == {"dry-run.jsonl", "dry-run.json", "dry-run.md"}
    assert json.loads((tmp_path / "dry-run.json").read_text())["claims"] == []


def test_lines_of_a_dry_run_are_never_taken_for_measured_ones():
    assert "not_measured" in found({**FAST, "dry_run": True}).lines["encoder", "64 x 512"]


def test_the_json_is_a_result_as_all_benchmarks_have_and_claims_only_what_was_measured(tmp_path):
    numbers = Numbers(tmp_path, "encoder", FAR_S, dry_run=False)
    numbers.add("64 x 512", {"rows_s": 2e7})
    numbers.add("64 x 512, published form", {"rows_s": 9e7})
    write(tmp_path, dry_run=False)
    (claim,) = read_claims(tmp_path)["gpu"]
    assert (claim.measured, claim.target, claim.holds) == (2e7, 1e7, True)


def test_the_summary_counts_numbers_and_not_the_ends_of_phases():
    counts = as_json(found(FAST, LOST, ENDED))["summary"]
    names = sum(len(expected(phase)) for phase in PHASES)
    assert counts == {"numbers": 1, "not measured": names - 1}


def test_parity_that_does_not_hold_is_a_claim_that_does_not_hold():
    lines = [{"phase": "parity", "what": str(i), "relative_difference": d} for i, d in enumerate((2e-3, 0.5, "inf"))]
    assert [claim["holds"] for claim in as_json(found(*lines[:1]))["claims"]] == [True]
    assert [claim["holds"] for claim in as_json(found(*lines[:2]))["claims"]] == [False]


def test_a_folder_without_lines_gives_a_table_without_numbers(tmp_path):
    text = write(tmp_path / "made", dry_run=False).read_text()
    assert text.startswith("# A card whose name was not measured")
    assert row(text, "64 x 512")[1].startswith("not measured: ")
