from __future__ import annotations

import json
import socket

import pytest
from typer.testing import CliRunner

from bench.__main__ import BENCHMARKS, app
from bench.harness import RESULTS, ROOT, BenchmarkError, Claim, Measurement, as_text, machine, read_claims, run

MET = Claim("throughput", 0.95, 0.9, "ratio", "at_least")
UNMET = Claim("P99", 12.0, 10.0, "ms", "at_most")


@pytest.mark.parametrize(
    ("measured", "direction", "holds"),
    [
        (1.0, "at_least", True),
        (0.99, "at_least", False),
        (1.01, "at_least", True),
        (1.0, "at_most", True),
        (0.99, "at_most", True),
        (1.01, "at_most", False),
        (float("nan"), "at_least", False),
        (float("nan"), "at_most", False),
    ],
)
def test_a_claim_holds_by_its_direction(measured, direction, holds):
    assert Claim("x", measured, 1.0, "ms", direction).holds is holds


@pytest.mark.parametrize("claim", [MET, UNMET])
def test_claims_survive_json(claim):
    written = json.loads(json.dumps(claim.as_json()))
    assert written["holds"] is claim.holds
    assert Claim.from_json(written) == claim


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"holds": True}, "its numbers say False"),
        ({"direction": "about"}, "unknown direction"),
        ({"measured": None}, "no claim"),
    ],
)
def test_claims_that_contradict_their_numbers_are_refused(change, says):
    with pytest.raises(BenchmarkError, match=says):
        Claim.from_json(UNMET.as_json() | change)


def test_a_run_keeps_machine_claims_and_raw_numbers(tmp_path, capsys):
    measured = Measurement({"rate": 100.0}, (MET, UNMET), {"rounds": [1, 2, 3]})
    assert run("example", lambda: measured, tmp_path / "results") is measured
    written = json.loads((tmp_path / "results" / "example.json").read_text())
    assert written["raw"] == {"rounds": [1, 2, 3]}
    assert [claim["holds"] for claim in written["claims"]] == [True, False]
    assert {"cpu", "cores", "memory_gib", "kernel", "python", "packages", "commit"} <= set(written["machine"])
    assert read_claims(tmp_path / "results") == {"example": (MET, UNMET)}
    assert "NO" in capsys.readouterr().out


def test_a_row_and_a_series_of_raw_values_stand_on_one_line_each():
    row = {"rate": 1.5, "statuses": {"OK": 3}, "models": ["a@1"], "missing": None}
    content = {"raw": {"latency_ms": [0.1] * 1000, "rounds": [row] * 40, "nothing": [], "words": "a\nb"}}
    text = as_text(content)
    assert json.loads(text) == content
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert lines.count(json.dumps(row)) == 40
    assert f'"latency_ms": {json.dumps([0.1] * 1000)}' in lines
    assert len(lines) == 40 + 9


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_as_the_harness_writes_them(path):
    text = path.read_text()
    assert as_text(json.loads(text)) == text


def test_a_run_without_a_results_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("example", lambda: Measurement({}, (), {}), None)
    assert not list(tmp_path.iterdir())


def test_a_failed_benchmark_leaves_the_old_result(tmp_path):
    run("example", lambda: Measurement({}, (MET,), {}), tmp_path)

    def fail() -> Measurement:
        raise BenchmarkError("the server did not start")

    with pytest.raises(BenchmarkError):
        run("example", fail, tmp_path)
    assert read_claims(tmp_path) == {"example": (MET,)}


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        run("example", lambda: Measurement({"rate": float("nan")}, (), {}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_machine_is_described_without_names_or_paths():
    text = json.dumps(machine())
    assert socket.gethostname() not in text
    assert str(ROOT) not in text


def test_claims_command_prints_all_and_fails_for_none_unmet(tmp_path):
    run("one", lambda: Measurement({}, (MET,), {}), tmp_path)
    run("two", lambda: Measurement({}, (UNMET,), {}), tmp_path)
    result = CliRunner().invoke(app, ["claims", "--results", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    lines = {name: line for line in result.output.splitlines() for name in ("one", "two") if f" {name} " in line}
    assert "yes" in lines["one"]
    assert "NO" in lines["two"]
    assert "<= 10 ms" in lines["two"]


def test_claims_command_fails_for_an_unreadable_result(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    result = CliRunner().invoke(app, ["claims", "--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "broken.json" in result.output


def test_committed_results_are_readable_and_of_known_benchmarks():
    assert set(read_claims()) <= set(BENCHMARKS)


def test_an_unknown_benchmark_is_refused():
    result = CliRunner().invoke(app, ["nothing"])
    assert result.exit_code == 1
    assert "serving" in result.output
