"""The process that makes Parquet files: what it reports, its priority, and what happens when it or its server dies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from impressions.archive import DAMAGED
from impressions.archive_process import listen, look
from impressions.segments import segments
from impressions.writing.log import ImpressionLog
from tests.impressions.answers import answered
from tests.impressions.log_files import archive_of, ids, opened, parquet, wait_until, write_segment

ROOT = Path(__file__).parents[2]


@contextmanager
def running(log: ImpressionLog) -> Iterator[list[OSError]]:
    """Run the log's archive on a thread, again whenever it fails, until the log is closed; yield the failures."""
    failures: list[OSError] = []

    def work() -> None:
        while True:
            try:
                log.archive_segments()
                return
            except OSError as error:
                failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield failures
    finally:
        log.close()
        log.write()
        thread.join()


def test_segments_become_files_as_soon_as_they_end_and_the_counts_come_back(tmp_path):
    log = opened(tmp_path, rotate_s=0.0)
    with running(log) as failures:
        for i in range(1, 4):
            log.offer_impression(answered(i))
            log.flush()
            wait_until(lambda i=i: log.archive.files == i)
        assert not segments(tmp_path / "spool")
        log.offer_impression(answered(4))
    assert not failures
    assert ids(tmp_path) == [1, 2, 3, 4]
    assert not segments(tmp_path / "spool")
    assert log.archive.files == 4
    assert log.archive.bytes == sum(path.stat().st_size for path in parquet(tmp_path))
    assert log.archive.pid is None


def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(tmp_path):
    log = opened(tmp_path, rotate_s=0.0)
    with running(log) as failures:
        for i in range(1, 4):
            wait_until(lambda: log.archive.pid is not None)
            os.kill(log.archive.pid, signal.SIGKILL)
            wait_until(lambda i=i: len(failures) == i)
            log.offer_impression(answered(i))
            log.flush()
    assert [str(error) for error in failures] == ["the process that makes Parquet files ended with -9"] * 3
    assert ids(tmp_path) == [1, 2, 3]
    assert not segments(tmp_path / "spool")


def test_signals_for_the_server_do_not_end_the_process(tmp_path):
    """As Ctrl+C in a terminal and `systemctl stop` send them to all processes of a server."""
    log = opened(tmp_path, rotate_s=0.0)
    with running(log) as failures:
        log.offer_impression(answered(1))
        log.flush()
        wait_until(lambda: log.archive.files == 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(log.archive.pid, number)
        log.offer_impression(answered(2))
    assert not failures
    assert ids(tmp_path) == [1, 2]
    assert not segments(tmp_path / "spool")


def test_events_of_the_process_are_those_of_the_server(tmp_path):
    segment = write_segment(tmp_path)
    segment.write_bytes(b"no stream")
    log = opened(tmp_path)
    with structlog.testing.capture_logs() as events, running(log):
        wait_until(lambda: log.archive.damaged == 1)
    (event,) = events
    moved = tmp_path / "spool" / DAMAGED / segment.name
    assert moved.exists()
    assert (event["event"], event["log_level"], event["moved_to"]) == ("segment_not_understood", "error", str(moved))


def test_a_killed_server_leaves_no_process_and_no_segment_behind(tmp_path):
    """Its process makes files of what was written, and ends."""
    command = [sys.executable, "-m", "tests.impressions.killed_writer", str(tmp_path), "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        written = 0
        while written < 500:
            written = int(server.stdout.readline().split()[1])
        child = only_child(server.pid)
        server.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert not segments(tmp_path / "spool")
    assert set(range(1, written + 1)) <= set(ids(tmp_path))
    assert parquet(tmp_path)


def only_child(pid: int) -> int:
    """Return the only child of a process, whichever of its threads started it."""
    (child,) = (one for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split())
    return int(child)


def test_what_a_living_process_writes_does_not_wait(tmp_path):
    living = opened(tmp_path)
    living.offer_impression(answered(1))
    living.flush()
    assert archive_of(living).waiting_bytes == 0
    living.close()
    living.write()
    (segment,) = segments(tmp_path / "spool")
    assert archive_of(living).waiting_bytes == segment.stat().st_size > 0


def test_a_system_without_idle_time_is_reported_once_and_files_are_made_all_the_same(tmp_path, monkeypatch):
    archive = archive_of(opened(tmp_path))
    said = []
    monkeypatch.setattr("impressions.archive_process._say", said.append)
    monkeypatch.setattr(os, "sched_setscheduler", refused)
    with structlog.testing.capture_logs() as events:
        for first in (1, 2):
            write_segment(tmp_path, count=1, first=first)
            look(archive, 1 << 30)
    assert [(event["event"], event["instead"]) for event in events] == [("archive_not_idle", "niceness 19")]
    assert [one["files"] for one in said] == [1, 1]
    assert ids(tmp_path) == [1, 2]


def refused(*_):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(("calls", "asked"), [(b"\n", [7, 7, 1]), (b"", [7, 7, 1]), (b"\n.", [])])
def test_a_server_that_says_no_farewell_is_dead_before_its_segments_are_archived(monkeypatch, calls, asked):
    """Its pipe may end before the locks on its segments."""
    parents, seen = [7, 7, 1], []
    woken, ended = threading.Event(), threading.Event()

    def parent():
        assert not ended.is_set()
        seen.append(parents.pop(0))
        return seen[-1]

    monkeypatch.setattr(os, "getppid", parent)
    heard, told = os.pipe()
    os.write(told, calls)
    os.close(told)
    listen(heard, 7, woken, ended)
    os.close(heard)
    assert seen == asked
    assert ended.is_set()
    assert woken.is_set()


@pytest.mark.parametrize(("hurry_bytes", "policy"), [(1 << 30, os.SCHED_IDLE), (1, os.SCHED_OTHER)])
def test_it_works_in_idle_time_unless_much_waits(tmp_path, monkeypatch, hurry_bytes, policy):
    write_segment(tmp_path)
    archive = archive_of(opened(tmp_path))
    policies = []
    monkeypatch.setattr(archive, "archive_all", lambda: policies.append(os.sched_getscheduler(0)))
    monkeypatch.setattr("impressions.archive_process._say", lambda _: None)
    look(archive, hurry_bytes)
    assert policies == [policy]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
