"""What may stand in the log, by pure policy and with literal events."""

from __future__ import annotations

import json

import pytest

from feature_client.stores.store import StoreUnavailableError
from server.telemetry.log_limits import LINE_BYTES_MAX, EventRates, WithholdLine, WriteLine, described, fitted


def test_an_event_that_comes_too_often_is_withheld_and_counted_until_there_is_room_again():
    rates = EventRates(burst=3, per_s=1.0, quiet_s=10.0)
    decisions = [rates.decide("failed", 0.1 * i) for i in range(5)]
    assert decisions == [WriteLine(0), WriteLine(0), WriteLine(0), WithholdLine(), WithholdLine()]
    assert rates.decide("other", 0.5) == WriteLine(0)
    assert rates.decide("failed", 1.0) == WriteLine(2)
    assert rates.withheld == {"failed": 2}


def test_what_was_withheld_of_an_event_that_ended_is_told_once():
    rates = EventRates(burst=1, per_s=1.0, quiet_s=10.0)
    rates.decide("failed", 0)
    rates.decide("failed", 0)
    assert rates.unreported(9.9) == {}
    assert rates.unreported(10.0) == {"failed": 1}
    assert rates.unreported(20.0) == {}
    assert rates.decide("failed", 30.0) == WriteLine(0)


def test_no_number_of_kinds_of_events_fills_memory_or_gets_past_the_limit():
    rates = EventRates(burst=2, per_s=0.0, events_max=5)
    written = sum(rates.decide(f"event {i}", 0) == WriteLine(0) for i in range(1_000))
    assert written == 5 + 2
    assert rates.withheld == {"other events": 993}


@pytest.mark.parametrize(
    "value",
    ["x" * 100_000, "\x00ü€" * 40_000, list(range(50_000)), {"key": "y" * 50_000}, [["z"] * 9_000]],
    ids=["text", "escaped", "list", "dict", "nested"],
)
def test_a_line_has_a_limit_whatever_stands_in_it(value):
    event = {"event": "failed", "level": "error", "value": value, "count": 7, "also": "short"}
    line = fitted(lambda fields: json.dumps(fields, default=repr), event, LINE_BYTES_MAX)
    assert len(line.encode()) <= LINE_BYTES_MAX
    found = json.loads(line)
    assert (found["event"], found["count"], found["also"], found["cut"]) == ("failed", 7, "short", True)


def test_a_line_within_the_limit_stays_as_it_is():
    assert json.loads(fitted(json.dumps, {"event": "serving", "labels": {"stable": 1}}, 100)) == {
        "event": "serving",
        "labels": {"stable": 1},
    }


def raised(secret):
    variable = secret + "-of-a-frame"
    try:
        try:
            {}[secret if variable else ""]
        except KeyError as error:
            raise StoreUnavailableError("the store failed") from error
    except StoreUnavailableError as error:
        return error


def test_an_exception_is_told_by_types_and_places_without_variables_or_foreign_texts():
    found = described(raised("planted-secret"), quote=False)
    assert [one["type"] for one in found] == ["feature_client.stores.store.StoreUnavailableError", "KeyError"]
    assert [one.get("text") for one in found] == ["the store failed", None]
    assert "test_log_limits.py" in found[1]["frames"][0]
    assert "planted-secret" not in repr(found)


def test_for_debugging_the_texts_are_there_but_never_the_variables():
    found = described(raised("planted-key"), quote=True)
    assert found[1]["text"] == "'planted-key'"
    assert "-of-a-frame" not in repr(found)


def test_groups_and_long_chains_of_exceptions_end():
    error = ValueError("the first")
    for _ in range(50):
        following = ValueError("the next")
        following.__cause__ = error
        error = following
    assert len(described(error, quote=False)) == 8
    both = described(ExceptionGroup("two", [TypeError(), OSError(28, "No space left on device")]), quote=False)
    assert [one["type"] for one in both] == ["ExceptionGroup", "OSError", "TypeError"]
    assert both[1]["text"] == "[Errno 28] No space left on device"
    error.__cause__ = error
    assert len(described(error, quote=False)) == 1
