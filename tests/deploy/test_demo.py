"""The demo as a real process, over invented ratings in the place where the real ones are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.ranker.interactions import write_atomic

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "demo.py"


@pytest.fixture
def cache(tmp_path):
    """A cache in which the demo finds its data."""
    write_atomic(tmp_path / "pinrank" / "ml-1m", name="ml-1m")
    return tmp_path


def command(*arguments):
    return [sys.executable, str(DEMO), "--grpc-port", "0", "--http-port", "0", *arguments]


def environment(cache):
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}


def run(cache, *arguments):
    return subprocess.run(
        command(*arguments), env=environment(cache), capture_output=True, text=True, timeout=120, check=False
    )


def filled(cache):
    catalogue = cache / "pinrank" / "demo" / "latest" / "catalogue.json"
    return catalogue.stat().st_mtime_ns


def server_address(cache):
    (log,) = (cache / "pinrank" / "demo").glob("ml-1m-*/server.log")
    serving = [json.loads(line) for line in log.read_text().splitlines() if '"serving"' in line]
    return int(serving[-1]["grpc"].rpartition(":")[2])


def listening():
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == "0A"}


def test_demo_fills_the_store_ranks_and_explains_and_a_second_start_finds_it_filled(cache):
    first = run(cache, "--once")
    assert first.returncode == 0, first.stderr
    for shown in (
        "the data's licence",
        "60 users, 90 pins, 2,400 actions",
        "40 actions on record; newest first:",
        "Pin number",
        "related to",
        "milliseconds: wire",
        "model ml1m@7",
        "degraded: nothing",
        "pinrank rank --address 127.0.0.1:",
    ):
        assert shown in first.stdout
    before = filled(cache)
    second = run(cache, "--once")
    assert second.returncode == 0
    assert "60 users" not in second.stdout
    assert filled(cache) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_stays_up_until_it_is_stopped_and_takes_its_server_along(cache, number):
    with subprocess.Popen(
        command(), env=environment(cache), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        for line in process.stdout:
            if "Ctrl-C stops it" in line:
                break
        process.send_signal(number)
        assert process.stdout.read().strip().endswith("stopped")
        assert process.wait() == 0
        watchdog.cancel()
    assert server_address(cache) not in listening()


def test_data_that_is_not_there_is_a_clear_error(cache, tmp_path):
    refused = run(cache, "--data", str(tmp_path / "nothing"))
    assert refused.returncode == 1
    assert "nothing holds no RecBole atomic files" in refused.stderr
    assert "Traceback" not in refused.stderr
