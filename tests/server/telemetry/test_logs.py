"""What reaches standard error, from a process that logs everything a server's parts may log."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from server.telemetry.log_limits import LINE_BYTES_MAX

SCRIPT = """
import asyncio, logging, sys, threading
import grpc.aio, structlog
from server.telemetry.logs import configure_logs, withheld_lines

configure_logs(sys.argv[1], sys.argv[2], ["planted-password", 'planted-"quoted"-password'])
log = structlog.get_logger("server.test")
log.info("started", answer=42)

def fail(row):
    variable = row
    raise ValueError(f"cannot use {variable}")

try:
    fail("planted-row")
except ValueError as error:
    log.error("failed", exc_info=error)
    logging.getLogger("grpc").error("Unexpected [ValueError] raised by servicer method [/planted-row/x]", exc_info=True)
logging.getLogger("asyncio").error("Exception in callback f('planted-row')\\nhandle: <planted-row>")
logging.getLogger("redis").warning("reply was %s of %d", "planted-row")
logging.getLogger("kernels.some_engine").warning("the plan is for another device")
try:
    raise grpc.aio.InternalError("Failed execute_batch planted-row")
except grpc.aio.InternalError:
    logging.getLogger("grpc").exception("ExecuteBatchError raised in core")
log.warning("said", reason="AUTH default planted-password", more='planted-"quoted"-password')
log.warning("forged", reason="a reason\\n2026-01-01 [error] forged by a bundle")
log.warning("nested", value={"key": ["planted-password"]}, text="x" * 2_720 + "planted-password" + "y" * 20_000)
log.warning("long", names=["planted-name-%d" % i for i in range(10_000)])
thread = threading.Thread(target=fail, args=("planted-row",), name="crashing")
thread.start()
thread.join()
for number in range(1_000):
    log.warning("often", number=number)
assert withheld_lines()["often"] > 900
log.info("ended")
"""


def logged(level, form):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, level, form], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def events():
    return [json.loads(line) for line in logged("info", "json").splitlines()]


def named(events, name):
    return [event for event in events if event["event"] == name]


def test_tracebacks_are_types_and_places(events):
    (failed,) = named(events, "failed")
    (shown,) = failed["exception"]
    assert shown["type"] == "ValueError"
    assert [frame.rpartition(" in ")[2] for frame in shown["frames"]] == ["<module>", "fail"]
    assert "planted-row" not in repr(events)


def test_what_libraries_say_is_told_up_to_where_they_quote(events):
    told = [(event["logger"], event["message"]) for event in named(events, "library")]
    assert told == [
        ("grpc", "Unexpected"),
        ("asyncio", "Exception in callback f"),
        ("redis", "reply was"),
        ("kernels.some_engine", "the plan is for another device"),
    ]


def test_a_thread_that_ends_by_an_exception_is_an_event(events):
    (failed,) = named(events, "thread_failed")
    assert (failed["thread"], failed["exception"][0]["type"]) == ("crashing", "ValueError")


def test_known_secrets_are_unreadable_wherever_they_are_quoted(events):
    (said,) = named(events, "said")
    assert (said["reason"], said["more"]) == ("AUTH default ***", "***")
    assert "planted-p" not in repr(events)


def test_an_event_that_comes_often_is_cut_short_and_the_count_told_in_the_end(events):
    assert 50 <= len(named(events, "often")) < 100
    told = named(events, "log_lines_withheld")[-1]
    assert told["of"] == "often"
    assert (
        told["lines"] + sum(e.get("withheld_before", 0) for e in named(events, "often")) + len(named(events, "often"))
        == 1_000
    )


def test_a_long_line_is_cut(events):
    (long,) = named(events, "long")
    assert long["cut"]
    assert len(json.dumps(long)) <= LINE_BYTES_MAX


def test_columns_for_people_hold_no_more_than_json():
    text = logged("info", "console")
    assert "planted-row" not in text
    assert "planted-password" not in text
    assert "ValueError\n  <string>:" in text
    assert "\x1b" not in text  # no colors into a file
    assert not [line for line in text.splitlines() if line.startswith("2026-01-01")]


def test_for_debugging_texts_of_exceptions_are_there_but_no_secrets():
    text = logged("debug", "json")
    assert "cannot use planted-row" in text
    assert "caller_gone" in text
    assert "planted-password" not in text
