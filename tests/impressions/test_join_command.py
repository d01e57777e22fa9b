"""`pinrank impressions join`, and what is left when it is killed."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from pyarrow.fs import LocalFileSystem
from typer.testing import CliRunner

from impressions.archive import write_parquet
from impressions.cli import register
from impressions.dataset import JoinError, read_manifest, read_slates
from impressions.join_command import duration_ms
from impressions.joining.output import output_folder
from tests.impressions.logs import Row, action, impression, seen, table
from tests.impressions.random_logs import BASE_MS, attributed_of, content, reasons_of


def write_log(folder: Path, **rows: list[Row]) -> Path:
    for name, found in rows.items():
        day = folder / name / "2023-11-14"
        day.mkdir(parents=True)
        write_parquet(table(name, found), str(day / "221320-host.parquet"), LocalFileSystem())
    return folder


def small_log(folder: Path) -> Path:
    return write_log(
        folder,
        impressions=[
            impression(1, BASE_MS, 7, [10, 11]),
            impression(2, BASE_MS + 60_000, 7, [11, 12], surface="related"),
        ],
        actions=[action(1, 7, 11, BASE_MS + 90_000), action(2, 7, 10, BASE_MS + 7_200_000)],
        seen=[seen(1, 0)],
    )


def run(*arguments: str | Path) -> tuple[int, str]:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["impressions", *map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, " ".join(result.output.split())


def test_the_command_writes_a_dataset_and_says_what_became_of_the_actions(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    code, output = run("join", log, "--window", "30m", "--out", tmp_path / "joined")
    assert code == 0, output
    assert "requests 2 4 pins, 2023-11-14 22:13:20 to 2023-11-14 22:14:20 UTC" in output
    assert "attributed 1 p50 30.0 s" in output
    assert "not attributed 1 after window" in output
    assert attributed_of(tmp_path / "joined") == {(7, 1): (2, 0)}
    assert [s.surface for s in read_slates(tmp_path / "joined")] == ["home", "related"]
    manifest = read_manifest(tmp_path / "joined")
    assert (manifest.window_ms, manifest.clock_skew_ms) == (1_800_000, 2_000)


def test_spans_surfaces_and_windows_of_the_command_reach_the_join(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    options = ("--since", "2023-11-14T22:14", "--until", "2023-11-15", "--surface", "related", "--clock-skew", "500ms")
    code, output = run("join", f"file://{log}", "--window", "2h", "--out", tmp_path / "joined", *options)
    assert code == 0, output
    manifest = read_manifest(tmp_path / "joined")
    assert (manifest.since_ms, manifest.until_ms) == (1_700_000_040_000, 1_700_006_400_000)
    assert (manifest.surfaces, manifest.counts.requests, manifest.clock_skew_ms) == (("related",), 1, 500)


def test_actions_of_a_file_join_beside_those_of_the_log(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    rows = {
        "event_id": [1, 9],
        "user_id": [7, 7],
        "pin_id": [11, 12],
        "action": ["save", "hide"],
        "time_ms": [BASE_MS + 90_000, BASE_MS + 70_000],
    }
    pq.write_table(pa.table(rows), tmp_path / "more.parquet")
    code, output = run(
        "join", log, "--window", "30m", "--out", tmp_path / "out", "--actions", tmp_path / "more.parquet"
    )
    assert code == 0, output
    assert attributed_of(tmp_path / "out") == {(7, 1): (2, 0), (7, 9): (2, 1)}
    assert reasons_of(tmp_path / "out") == {(7, 2): "after_window"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"event_id": [1]}, "more.parquet lacks user_id, pin_id, action, time_ms; it must have the columns"),
        (
            {"event_id": [-1], "user_id": [7], "pin_id": [11], "action": ["save"], "time_ms": [1]},
            "more.parquet: column event_id must be uint64",
        ),
        (
            {"event_id": [1], "user_id": [7], "pin_id": [None], "action": ["save"], "time_ms": [1]},
            "has a row without pin_id",
        ),
    ],
)
def test_a_file_of_actions_that_does_not_fit_is_refused(
    tmp_path: Path, rows: dict[str, list[object]], message: str
) -> None:
    log = small_log(tmp_path / "log")
    pq.write_table(pa.table(rows), tmp_path / "more.parquet")
    code, output = run(
        "join", log, "--window", "30m", "--out", tmp_path / "out", "--actions", tmp_path / "more.parquet"
    )
    assert code == 1
    assert message in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "half an hour"), "error: --window half an hour: write a number and a unit"),
        (("--window", "-30m"), "error: --window -30m: write a number and a unit (ms, s, m, h or d) without a sign"),
        (("--window", "0s"), "error: --window must be longer than 0, e.g. --window 30m"),
        (("--window", "30m", "--clock-skew", "-2s"), "error: --clock-skew -2s: write a number and a unit"),
        (("--window", "30m", "--since", "yesterday"), "error: --since yesterday: write a date or a time such as"),
        (
            ("--window", "30m", "--since", "2023-11-16", "--until", "2023-11-15"),
            "error: --since must be before --until",
        ),
    ],
)
def test_bad_options_end_with_an_error_that_names_the_fix(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, output = run("join", small_log(tmp_path / "log"), "--out", tmp_path / "joined", *options)
    assert code == 1
    assert message in output
    assert not (tmp_path / "joined").exists()


def test_a_folder_that_is_no_log_is_refused(tmp_path: Path) -> None:
    code, output = run("join", tmp_path / "nowhere", "--window", "30m", "--out", tmp_path / "joined")
    assert code == 1
    assert "nowhere" in output


@pytest.mark.parametrize("command", [("join", "--window", "30m", "--out", "again"), ("check",), ("stat",)])
def test_a_joined_dataset_is_not_taken_for_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("join", small_log(tmp_path / "log"), "--window", "30m", "--out", tmp_path / "joined")
    code, output = run(*command, tmp_path / "joined")
    assert code == 1
    assert (
        "joined: this is a joined dataset, which `pinrank impressions join` wrote, and not an impression log" in output
    )
    assert "name the log that it was joined from" in output


def test_a_log_is_not_taken_for_a_joined_dataset(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    with pytest.raises(JoinError, match=f"log is an impression log .*pinrank impressions join {log} --window 30m"):
        read_manifest(log)


def test_a_step_that_fails_leaves_no_half_of_a_bar_on_a_pipe(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10], utilities=[math.nan])]
    code, output = run(
        "join", write_log(tmp_path / "log", impressions=rows), "--window", "30m", "--out", tmp_path / "j"
    )
    assert code == 1
    assert output.startswith("error: no request of the log is left to join: 1 are left out because of scores")


def test_the_summary_says_what_was_cut(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10, 11, 12], utilities=[1.0, math.nan, math.nan])]
    code, output = run(
        "join", write_log(tmp_path / "log", impressions=rows), "--window", "30m", "--out", tmp_path / "j"
    )
    assert code == 0, output
    assert "cut 1 at their last pin with scores; 2 pins lack them" in output


def test_the_summary_says_that_reports_were_of_other_users(tmp_path: Path) -> None:
    rows = [impression(1, BASE_MS, 7, [10, 11])]
    log = write_log(tmp_path / "log", impressions=rows, seen=[seen(1, 0, user_id=8), seen(1, 1, user_id=9)])
    code, output = run("join", log, "--window", "30m", "--out", tmp_path / "j")
    assert code == 0, output
    assert "seen reports of other users 2 not counted; the answer was another user's" in output
    assert "with a report of what was seen 0" in output


@pytest.mark.parametrize(
    ("text", "expected_ms"), [("30m", 1_800_000), ("1800s", 1_800_000), ("2h", 7_200_000), ("1d", 86_400_000)]
)
def test_durations_have_a_unit(text: str, expected_ms: int) -> None:
    assert duration_ms("--window", text) == expected_ms


def test_two_joins_cannot_write_one_dataset_at_once(tmp_path: Path) -> None:
    twice = output_folder(tmp_path / "out")
    with output_folder(tmp_path / "out"), pytest.raises(JoinError, match="another join is writing"), twice:
        pass


#: Joins a log and stops before the file operation of a given number that makes the dataset visible, until it is killed.
_STOPPING = """
import sys
from pathlib import Path
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.reading import read_tables

log, out, stop_before = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
replace, done = Path.replace, []

def stopping(self, target):
    if len(done) == stop_before:
        print("stopped", flush=True)
        sys.stdin.read()
    done.append(target)
    return replace(self, target)

Path.replace = stopping
join_log(lambda table, needed: read_tables(log, table, wanted=needed), out, Wanted(Window(1_000_000, 0)))
"""


@pytest.mark.parametrize("stop_before", [0, 1, 2], ids=["first file", "second file", "manifest"])
def test_a_join_that_is_killed_leaves_the_old_dataset_whole(tmp_path: Path, stop_before: int) -> None:
    log = small_log(tmp_path / "log")
    run("join", log, "--window", "30m", "--out", tmp_path / "joined")
    before = content(tmp_path / "joined")
    command = [sys.executable, "-c", _STOPPING, str(log), str(tmp_path / "joined"), str(stop_before)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"stopped\n"
        child.send_signal(signal.SIGKILL)
    left = {path.name: path.read_bytes() for path in (tmp_path / "joined").iterdir() if path.is_file()}
    assert before.items() <= left.items()
    assert [s.requests for s in read_slates(tmp_path / "joined")] == [1, 1]
    # The next join cleans up after it, and gives what it always gives.
    run("join", log, "--window", "30m", "--out", tmp_path / "joined")
    assert content(tmp_path / "joined") == before
