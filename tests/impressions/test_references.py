"""`pinrank impressions check` compares actions and reports with the answers that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from typer.testing import CliRunner

from impressions.inspection.check import check_log
from server.cli.main import app
from tests.impressions import random_logs
from tests.impressions.log_files import write_file
from tests.impressions.logs import action, impression, seen

NOW_MS = 1_700_000_000_000


def found(folder: Path) -> tuple[list[tuple[str, int | None, str, str]], list[str]]:
    """Return where, row, field and what of each contradiction, and the notes."""
    notes: list[str] = []
    problems = [
        (one.where, one.row, one.field, one.what)
        for one in check_log(str(folder), NOW_MS, notes.append)
        if one.field in {"user_id", "pin_id", "position", "positions"}
    ]
    return problems, notes


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """Return a log with one answer: request 9 showed user 7 the pins 10, 11, 12 and, again, 10."""
    write_file(tmp_path, "impressions", [impression(9, NOW_MS, 7, [10, 11, 12, 10])])
    return tmp_path


ELSEWHERE = "request 9 did not show the pin at this position"


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        (action(1, 8, 10, NOW_MS, request_id=9), "user_id", "request 9 was another user's"),
        (action(1, 8, 99, NOW_MS, request_id=9, position=7), "user_id", "request 9 was another user's"),
        (action(1, 7, 99, NOW_MS, request_id=9), "pin_id", "request 9 did not show this pin"),
        (action(1, 7, 99, NOW_MS, request_id=9, position=0), "pin_id", "request 9 did not show this pin"),
        (action(1, 7, 11, NOW_MS, request_id=9, position=2), "position", ELSEWHERE),
        (action(1, 7, 11, NOW_MS, request_id=9, position=4), "position", ELSEWHERE),
    ],
)  # fmt: skip
def test_an_action_that_contradicts_the_answer_it_names_is_a_problem(shown, row, field, what):
    path = write_file(shown, "actions", [action(2, 7, 11, NOW_MS, request_id=9), row])
    assert found(shown) == ([(str(path), 1, field, what)], [])


@pytest.mark.parametrize(
    "row",
    [
        action(1, 7, 10, NOW_MS, request_id=9),
        action(1, 7, 10, NOW_MS, request_id=9, position=0),
        action(1, 7, 10, NOW_MS, request_id=9, position=3),
        action(1, 8, 99, NOW_MS),
        action(1, 8, 99, NOW_MS, position=5),
    ],
)
def test_an_action_that_fits_its_answer_or_names_none_is_no_problem(shown, row):
    write_file(shown, "actions", [row])
    assert found(shown) == ([], [])


def test_reported_positions_beyond_the_returned_pins_are_a_problem(shown):
    path = write_file(shown, "seen", [seen(9, 0, 3), seen(9), seen(9, 1, 4, 2)])
    assert found(shown) == ([(str(path), 2, "positions", "request 9 returned fewer pins than a position says")], [])


def test_a_report_of_another_user_than_the_answers_is_a_problem(shown):
    path = write_file(shown, "seen", [seen(9, 0, user_id=7), seen(9, 1), seen(9, 1, user_id=8), seen(9, 9, user_id=8)])
    assert found(shown) == ([(str(path), row, "user_id", "request 9 was another user's") for row in (2, 3)], [])


def test_an_answer_without_pins_has_no_position(tmp_path):
    write_file(tmp_path, "impressions", [impression(9, NOW_MS, 7, [])])
    write_file(tmp_path, "seen", [seen(9, 0), seen(9)])
    write_file(tmp_path, "actions", [action(1, 7, 10, NOW_MS, request_id=9)])
    assert [(row, field) for _, row, field, _ in found(tmp_path)[0]] == [(0, "pin_id"), (0, "positions")]


def test_ids_that_the_log_does_not_have_are_counted_in_a_note(shown):
    actions = [action(n, 7, 10, NOW_MS, request_id=number) for n, number in enumerate((9, 5, 5, 6), 1)]
    path = write_file(shown, "actions", [*actions, action(9, 7, 10, NOW_MS)])
    reported = write_file(shown, "seen", [seen(9, 0), seen(8, 200)])
    problems, notes = found(shown)
    assert problems == []
    assert notes[0].startswith(
        "actions: 3 of the 4 rows with a request_id name 2 requests that the log does not have, "
        f"e.g. {path}, row 1: request 5."
    )
    assert notes[1].startswith(
        "seen: 1 of the 2 rows with a request_id name 1 requests that the log does not have, "
        f"e.g. {reported}, row 1: request 8."
    )


def test_many_contradictions_are_counted_over_all_files(shown):
    paths = [
        write_file(shown, "actions", [action(10 * n + i, 8, 10, NOW_MS, request_id=9) for i in range(4)], n)
        for n in (1, 2)
    ]
    problems, _ = found(shown)
    named = [(where, row) for where, row, _, _ in problems]
    assert named == [(str(paths[0]), row) for row in (0, 1, 2, None)]
    assert "5 more rows" in problems[3][3]


def test_check_ends_with_1_for_a_contradiction_and_with_0_for_a_note(shown):
    path = write_file(shown, "actions", [action(1, 7, 10, NOW_MS, request_id=5)])
    write_file(
        shown, "impressions", [{**impression(9, NOW_MS, 7, [10]), "utilities": [0.0], "party_weights": [0.0, 0.0]}]
    )
    run = CliRunner().invoke(app, ["impressions", "check", str(shown)])
    assert run.exit_code == 0, run.output
    assert run.output.startswith("note: actions: ")
    assert run.output.endswith("no problems found\n")
    write_file(shown, "actions", [action(1, 8, 10, NOW_MS, request_id=9)])
    run = CliRunner().invoke(app, ["impressions", "check", str(shown)])
    assert run.exit_code == 1
    assert run.output == (
        f"{path}, row 0, user_id: request 9 was another user's\n"
        "  fix: the frontend mixes up its answers: send the request_id of the answer that this user got\n"
    )


@settings(max_examples=60, deadline=None)
@given(random_logs.logs())
def test_contradictions_are_those_of_a_comparison_row_by_row(tmp_path_factory, log):
    folder = tmp_path_factory.mktemp("log")
    # Answers that contradict each other leave open which of them an action fits.
    answers = list({row["request_id"]: row for row in log.impressions}.values())
    half = len(answers) // 2
    write_file(folder, "impressions", answers[:half], 1)
    write_file(folder, "impressions", answers[half:], 2)
    write_file(folder, "actions", log.actions)
    write_file(folder, "seen", log.seen)
    known = {row["request_id"]: row for row in answers}
    expected = dict.fromkeys(("user_id", "pin_id", "position", "positions"), 0)
    for row in log.actions:
        if (answer := known.get(row["request_id"])) is None:
            continue
        places = [place for place, pin in enumerate(answer["pin_ids"]) if pin == row["pin_id"]]
        if answer["user_id"] != row["user_id"]:
            expected["user_id"] += 1
        elif not places:
            expected["pin_id"] += 1
        elif row["position"] is not None and row["position"] not in places:
            expected["position"] += 1
    for row in log.seen:
        if (answer := known.get(row["request_id"])) is None:
            continue
        if row["user_id"] not in (None, answer["user_id"]):
            expected["user_id"] += 1
        else:
            expected["positions"] += max(row["positions"]) >= len(known[row["request_id"]]["pin_ids"])
    problems, _ = found(folder)
    counted = dict.fromkeys(expected, 0)
    for _, row, field, what in problems:
        counted[field] += 1 if row is not None else int(what.split(" ", 1)[0])
    assert counted == expected
