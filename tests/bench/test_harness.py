from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.benchmarks import BENCHMARKS
from bench.harness import (
    RESULTS,
    ROOT,
    BenchmarkError,
    Claim,
    Conclusion,
    Raw,
    as_text,
    conclude_kept,
    read_claims,
    run,
)
from bench.provenance import commits_since, machine, provenance_table
from bench.serving import isolation, recording
from bench.test_bed import known_ratio

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
    raw, concluded = {"rounds": [1, 2, 3]}, Conclusion({"rate": 100.0}, (MET, UNMET))
    assert run("example", lambda: [raw], lambda _: concluded, tmp_path / "results") == (raw, concluded)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["example.json"]
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
    run("example", lambda: [{}], lambda _: Conclusion({}, ()), None)
    assert not list(tmp_path.iterdir())


def test_a_failed_benchmark_leaves_the_old_result(tmp_path):
    run("example", lambda: [{}], lambda _: Conclusion({}, (MET,)), tmp_path)

    def fail() -> Iterator[Raw]:
        raise BenchmarkError("the server did not start")

    with pytest.raises(BenchmarkError):
        run("example", fail, lambda _: Conclusion({}, ()), tmp_path)
    assert read_claims(tmp_path) == {"example": (MET,)}


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        run("example", lambda: [{}], lambda _: Conclusion({"rate": float("nan")}, ()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["example.raw"]


def test_the_machine_is_described_without_names_or_paths():
    text = json.dumps(machine())
    assert socket.gethostname() not in text
    assert str(ROOT) not in text


def test_claims_command_prints_all_and_fails_for_none_unmet(tmp_path):
    run("one", lambda: [{}], lambda _: Conclusion({}, (MET,)), tmp_path)
    run("two", lambda: [{}], lambda _: Conclusion({}, (UNMET,)), tmp_path)
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


def _three_rounds() -> Iterator[Raw]:
    rounds: list[int] = []
    for number in range(3):
        rounds.append(number)
        yield {"rounds": rounds}


def _broken(raw: Raw) -> Conclusion:
    return Conclusion({"rate": 1 / 0 * len(raw)}, ())


def _mended(raw: Raw) -> Conclusion:
    return Conclusion({"rounds": float(len(raw["rounds"]))}, (MET,))


def test_a_failed_conclusion_loses_nothing_and_can_be_drawn_again(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError):
        run("example", _three_rounds, _broken, tmp_path)
    said = capsys.readouterr().err
    assert "example.raw" in said
    assert "python -m bench conclude example" in said
    began = json.loads((tmp_path / "example.raw").read_text())
    assert conclude_kept("example", _mended, tmp_path).summary == {"rounds": 3.0}
    written = json.loads((tmp_path / "example.json").read_text())
    assert written["raw"] == {"rounds": [0, 1, 2]}
    assert (written["date"], written["machine"]) == (began["date"], began["machine"])
    assert [path.name for path in tmp_path.iterdir()] == ["example.json"]


def test_the_rounds_before_a_failure_are_kept_but_are_no_result(tmp_path, capsys):
    def cut_off() -> Iterator[Raw]:
        for raw in _three_rounds():
            if len(raw["rounds"]) == 3:
                raise BenchmarkError("the server died")
            yield raw

    run("example", _three_rounds, _mended, tmp_path)
    with pytest.raises(BenchmarkError, match="the server died"):
        run("example", cut_off, _mended, tmp_path)
    assert conclude_kept("example", _mended, tmp_path).summary == {"rounds": 2.0}
    assert "did not end" in capsys.readouterr().err
    assert json.loads((tmp_path / "example.json").read_text())["raw"] == {"rounds": [0, 1, 2]}
    assert (tmp_path / "example.raw").exists()


def test_a_run_that_measured_nothing_promises_no_kept_results(tmp_path, capsys):
    def fail() -> Iterator[Raw]:
        raise BenchmarkError("the server did not start")

    with pytest.raises(BenchmarkError):
        run("example", fail, _mended, tmp_path)
    assert "kept" not in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="no example.raw and no example.json"):
        conclude_kept("example", _mended, tmp_path)


def test_a_claim_over_nothing_says_why_it_cannot_be_judged(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    claim = Claim.ratio("goodput", 3.0, 0.0, 0.9, "at_least", "the ideal queue holds no rate")
    run("example", lambda: [{}], lambda _: Conclusion({}, (claim, MET)), tmp_path)
    assert "cannot be judged: the ideal queue holds no rate" in capsys.readouterr().out
    (read, met) = read_claims(tmp_path)["example"]
    assert (read, met) == (claim, MET)
    assert read.measured is None
    assert not read.holds
    assert Claim.ratio("goodput", 3.0, 4.0, 0.9, "at_least", "-").measured == 0.75


def test_raw_results_of_an_older_form_are_named(tmp_path):
    run("example", lambda: [{"runs": []}], lambda _: Conclusion({}, ()), tmp_path)
    with pytest.raises(BenchmarkError, match="example.json has no 'rounds'.* measure again"):
        conclude_kept("example", _mended, tmp_path)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_claims_show_what_became_of_the_measured_code(tmp_path):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    for number in range(3):
        (tmp_path / "server.py").write_text(f"{number}\n")
        (tmp_path / f"other{number}.py").write_text("\n")
        git("add", ".")
        git("commit", "-q", "-m", f"{number}")
    first = git("rev-parse", "--short=12", "HEAD~2")
    assert commits_since(first, ["server.py"], tmp_path) == 2
    assert commits_since(first, ["other0.py"], tmp_path) == 0
    assert commits_since("0123456789ab", ["server.py"], tmp_path) is None
    about = {"date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "A Processor", "commit": f"{first}-dirty"}}
    without = {"date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "A Processor", "commit": None}}
    table = provenance_table({"one": about, "two": without}, {"one": ["server.py"], "two": ["server.py"]}, tmp_path)
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["A Processor"] * 2
    assert columns[2] == ["2026-01-02"] * 2
    assert columns[4] == ["2 commits; measured on a dirty tree", "unknown"]


def test_without_git_the_age_of_a_result_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commits_since("0123456789ab", ["server"]) is None
    assert machine()["commit"] is None


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda benchmark: benchmark.name)
def test_what_a_benchmark_measures_exists(benchmark):
    assert [path for path in benchmark.sources if not (ROOT / path).exists()] == []


def test_conclude_command_goes_on_from_what_a_failed_run_has_kept(tmp_path):
    about = {"name": "bulk_load", "date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "A Processor"}}
    rounds = [{"redis": 100_000.0, "lmdb": 300_000.0, "redis_py": 50_000.0}]
    (tmp_path / "bulk_load.raw").write_text(json.dumps({**about, "complete": True, "raw": {"rounds": rounds}}))
    result = CliRunner().invoke(app, ["conclude", "bulk_load", "--results", str(tmp_path)])
    assert result.exit_code == 0
    assert [claim.holds for claim in read_claims(tmp_path)["bulk_load"]] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["bulk_load.json"]


@pytest.mark.parametrize(
    ("names", "says"), [(["conclude"], "conclude which"), (["conclude", "nothing"], "no benchmark")]
)
def test_conclude_command_wants_the_name_of_a_benchmark(names, says):
    result = CliRunner().invoke(app, names)
    assert result.exit_code == 1
    assert says in result.output


def test_rounds_without_an_answer_leave_the_others_to_judge_by():
    assert known_ratio([2.0, None, 3.0, 8.0], [1.0, 1.0, 0.0, 2.0]) == 3.0
    assert known_ratio([None], [1.0]) is None


def test_a_load_that_nobody_answered_is_concluded_and_not_judged():
    nothing = {"latency_ms": None, "good_share": 0.0}
    step = {"small_per_s": 9.0, "large_per_s": 1.0, "without": nothing, "beside": nothing, "large": nothing}
    (claim,) = isolation.conclude({"rounds": [step]}).claims
    assert (claim.measured, claim.holds) == (None, False)
    raw = {"rounds": {"redis": [{**step, "record_s": [1.0]}]}, "held_ms": {"redis": [1.0]}}
    (claim, _) = recording.conclude(raw).claims
    assert (claim.measured, claim.holds) == (None, False)
