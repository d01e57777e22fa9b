"""`pinrank impressions stat` and `check`, over real logs with one thing wrong."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from impressions.archive import write_parquet
from impressions.errors import LogError
from impressions.inspection.check import check_log
from impressions.inspection.problem import Problem
from impressions.inspection.summary import summarize
from impressions.places import file_of, new_stem
from impressions.schema import TABLES
from impressions.writing.log import ImpressionLog, LogSettings
from impressions.writing.rows import Exploring, RecordedAction, RecordedActions, SeenReport
from model_store.exploration.orders import OrderExplorer
from server.cli.main import app
from tests.impressions import logs
from tests.impressions.answers import WEIGHTS, ToyScores, answered


def write_log(folder: Path, rows, *, archive: bool = True) -> None:
    log = ImpressionLog(LogSettings(f"file://{folder}"))
    for row in rows:
        log.offer_impression(row)
    log.offer_seen(SeenReport(1, int(time.time() * 1_000), np.array([0], np.uint32)))
    now_ms, first = int(time.time() * 1_000), rows[0]
    pin_id = int(first.pin_ids[first.scores.order[0]])
    action = RecordedAction(3, first.user_id, pin_id, "save", "home", now_ms - 50, now_ms, first.request_id, 0)
    log.offer_actions(RecordedActions(1, lambda: [action]))
    log.close()
    log.write()
    if archive:
        log.archive_segments()


def changed_file(folder: Path, table: str = "impressions", **columns) -> Path:
    """Change columns of the log's only file of a table: functions of lists of values."""
    (path,) = folder.glob(f"{table}/*/*.parquet")
    rows = pq.read_table(path).to_pylist()
    for name, change in columns.items():
        for row, value in zip(rows, change([row[name] for row in rows]), strict=True):
            row[name] = value
    write_parquet(logs.table(table, rows), str(path), pa.fs.LocalFileSystem())
    return path


def problems(folder: Path) -> list[Problem]:
    return list(check_log(str(folder), int(time.time() * 1_000)))


#: Draws any order of five pins.
ANY_ORDER = OrderExplorer(7, 0.5, 10.0, WEIGHTS, best=5, temperature=1.0, floor=0.5)


def drawn(request_id: int, arm: str, *, order: list[int]):
    row = answered(request_id)
    scores = ToyScores(np.array(order), row.scores.utilities, row.scores.probabilities, row.scores.party_utilities)
    return answered(request_id, scores=scores, exploring=Exploring("e" * 64, 7, arm, ANY_ORDER))


def test_a_sound_log_has_no_problems(tmp_path):
    trimmed = answered(21)
    lost = np.array([True, False, True, False, False])
    parties, utilities = trimmed.scores.party_utilities.copy(), trimmed.scores.utilities.copy()
    parties[lost], utilities[lost] = np.nan, np.nan
    order = np.argsort(np.where(lost, np.inf, -utilities), kind="stable")
    nan_last = answered(21, scores=ToyScores(order, utilities, trimmed.scores.probabilities, parties))
    rows = [*(answered(i) for i in range(1, 21)), nan_last, drawn(22, "best-3", order=[4, 3, 2, 1, 0]), answered(23, 1)]
    write_log(tmp_path, rows)
    assert problems(tmp_path) == []
    write_log(tmp_path, [answered(i) for i in range(30, 40)], archive=False)
    assert problems(tmp_path) == []


def replaced(row: int, value):
    return lambda values: [value if i == row else one for i, one in enumerate(values)]


@pytest.mark.parametrize(
    ("field", "change", "what"),
    [
        ("request_id", replaced(2, 0), "0 names no request"),
        ("order_propensity", replaced(2, 0.0), "not in (0, 1]"),
        ("order_propensity", replaced(2, 1.0000001), "not in (0, 1]"),
        ("order_propensity", replaced(2, float("nan")), "not in (0, 1]"),
        ("propensities", replaced(2, [1.0, 1.0, 0.0, 1.0, 1.0]), "not in (0, 1]"),
        ("propensities", replaced(2, [1.0]), "its length does not fit"),
        ("probabilities", replaced(2, [0.5] * 14), "its length does not fit"),
        ("attribute_values", replaced(2, []), "its length does not fit"),
        ("places", replaced(2, [0, 1, 2, 3, 5]), "a pin stands twice, or at a position"),
        ("places", replaced(2, [0, 1, 2, 3, 3]), "a pin stands twice, or at a position"),
        ("time_ms", lambda ms: [one + 120_000 * (i == 2) for i, one in enumerate(ms)], "the time is in the future"),
        ("time_ms", lambda ms: [one - 120_000 * (i == 2) for i, one in enumerate(ms)], "the clock went back"),
    ],
)
def test_one_wrong_value_is_the_only_problem_and_names_file_row_and_field(tmp_path, field, change, what):
    write_log(tmp_path, [answered(i) for i in range(1, 6)])
    path = changed_file(tmp_path, **{field: change})
    found = problems(tmp_path)
    assert [(one.where, one.row, one.field) for one in found] == [(str(path), 2, field)]
    assert what in found[0].what
    assert found[0].fix
    assert str(found[0]).startswith(f"{path}, row 2, {field}: ")


def test_utilities_that_differ_in_the_last_bit_are_found(tmp_path):
    write_log(tmp_path, [answered(i) for i in range(1, 6)])

    def one_bit(values):
        last = np.float32(values[3][4])
        values[3][4] = float(np.nextafter(last, np.float32(-np.inf)))
        return values

    changed_file(tmp_path, utilities=one_bit)
    assert [(one.row, one.field) for one in problems(tmp_path)] == [(3, "utilities")]


def test_weights_of_another_order_are_found(tmp_path):
    write_log(tmp_path, [answered(i) for i in range(1, 6)])
    changed_file(tmp_path, party_weights=replaced(1, [1.0, 0.30000001]))
    assert [(one.row, one.field) for one in problems(tmp_path)] == [(1, "utilities")]


def test_an_order_against_its_utilities_is_found_unless_it_was_drawn(tmp_path):
    backwards = answered(2).scores.order[::-1].tolist()
    rows = [answered(1), drawn(2, "more_creator", order=backwards), drawn(3, "best-5", order=[4, 3, 2, 1, 0])]
    write_log(tmp_path, rows)
    assert [(one.row, one.field) for one in problems(tmp_path)] == [(1, "pin_ids")]


def test_repeated_requests_are_found_within_and_across_files(tmp_path):
    write_log(tmp_path, [answered(i) for i in (1, 2, 3, 2)])
    write_log(tmp_path, [answered(i) for i in (4, 1)])
    found = [one for one in problems(tmp_path) if one.field == "request_id"]
    assert len(found) == 2
    assert "request 1 stands also in" in found[0].what
    assert found[0].row == 1
    assert "request 2 stands also in" in found[1].what
    assert found[1].row == 3


def test_many_equal_problems_are_counted(tmp_path):
    write_log(tmp_path, [answered(i) for i in range(1, 101)])
    changed_file(tmp_path, order_propensity=lambda values: [0.0] * len(values))
    found = problems(tmp_path)
    assert [one.row for one in found] == [0, 1, 2, None]
    assert "97 more rows" in found[3].what


def test_wrong_actions_and_reports_are_found(tmp_path):
    write_log(tmp_path, [answered(1)])
    changed_file(tmp_path, "actions", time_ms=lambda ms: [one + 61_000 for one in ms])
    changed_file(tmp_path, "seen", request_id=lambda ids: [0 for _ in ids])
    assert [(Path(one.where).parts[-3], one.field) for one in problems(tmp_path)] == [
        ("actions", "time_ms"), ("seen", "request_id"),
    ]  # fmt: skip


def test_unreadable_and_foreign_files_are_named_and_the_others_are_checked(tmp_path):
    write_log(tmp_path, [answered(i) for i in range(1, 6)])
    changed_file(tmp_path, request_id=replaced(0, 0))
    broken, foreign = (tmp_path / file_of(new_stem("impressions", n)) for n in (7, 8))
    broken.write_bytes(b"PAR1 and no more")
    pq.write_table(TABLES["impressions"].empty_table(), foreign)
    aside = tmp_path / "spool" / "damaged" / "impressions-2026-01-01-000000-h-1-000000-1.arrows"
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_bytes(b"?")
    found = {one.where: one for one in problems(tmp_path)}
    assert len(found) == 4
    assert found[str(broken)].what.startswith("the file is damaged")
    assert found[str(broken)].fix == "move it away, and keep it for a repair"
    assert "fingerprint none" in found[str(foreign)].what
    assert "set aside" in found[str(aside)].what
    assert sum(one.field == "request_id" for one in found.values()) == 1


def test_check_ends_with_1_and_prints_fixes_or_says_that_all_is_well(tmp_path):
    write_log(tmp_path, [answered(i) for i in range(1, 6)])
    run = CliRunner()
    sound = run.invoke(app, ["impressions", "check", str(tmp_path)])
    assert (sound.exit_code, sound.output) == (0, "no problems found\n")
    path = changed_file(tmp_path, order_propensity=replaced(2, 0.0))
    wrong = run.invoke(app, ["impressions", "check", f"file://{tmp_path}"])
    assert wrong.exit_code == 1
    assert wrong.output == (
        f"{path}, row 2, order_propensity: not in (0, 1]\n  fix: no estimate can use it: leave the row out\n"
    )
    none = run.invoke(app, ["impressions", "check", str(tmp_path / "nowhere")])
    assert none.exit_code == 1
    assert "there is no such folder" in none.output


def test_stat_counts_what_the_log_holds(tmp_path):
    rows = [answered(i) for i in range(1, 9)] + [drawn(9, "best-2", order=[0, 1, 2, 3, 4]), answered(10, 3)]
    write_log(tmp_path, rows)
    write_log(tmp_path, [answered(11)], archive=False)
    found = summarize(str(tmp_path))
    assert (found.requests, found.users, found.pins, found.explored) == (11, 7, 53, 1)
    assert dict(found.surfaces) == {"home": 11}
    assert dict(found.models) == {"toy@1": 11}
    assert sum(found.days.values()) == 11
    impressions = found.tables["impressions"]
    assert (impressions.files, impressions.segments) == (1, 1)
    (file,) = tmp_path.glob("impressions/*/*.parquet")
    assert impressions.bytes == file.stat().st_size
    assert impressions.segment_bytes > 0
    assert found.tables["seen"].rows == found.tables["actions"].rows == 2
    shown = CliRunner().invoke(app, ["impressions", "stat", str(tmp_path)])
    assert shown.exit_code == 0
    assert "11 of 7 users, 4.8 pins each" in shown.output
    assert "1 (9.09%)" in shown.output
    assert "toy@1: 11" in shown.output


def test_stat_of_a_damaged_log_names_the_file(tmp_path):
    write_log(tmp_path, [answered(1)])
    (path,) = tmp_path.glob("impressions/*/*.parquet")
    path.write_bytes(b"PAR1")
    with pytest.raises(LogError, match=f"{path}: the file is damaged"):
        summarize(str(tmp_path))
    shown = CliRunner().invoke(app, ["impressions", "stat", str(tmp_path)])
    assert shown.exit_code == 1
    assert f"error: {path}: the file is damaged" in shown.output
