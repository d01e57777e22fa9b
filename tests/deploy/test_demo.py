"""The demo as a real process, over invented ratings in the place where the real ones are kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.demo.home import PINRANK, content_digest, utility_by_affinity
from model_store.registry.store import open_model_store
from ranker.data.schema import ActionRule, ActionSchema
from tests.conftest import needs_training
from tests.ranker.interactions import write_atomic

ROOT = Path(__file__).parent.parent.parent
STABLE = open_model_store(ROOT / "deploy" / "demo" / "models").resolve("ml1m", "stable")


@pytest.fixture
def cache(tmp_path):
    """A cache in which the demo finds its data."""
    write_atomic(tmp_path / "pinrank" / "ml-1m", name="ml-1m")
    return tmp_path


def command(*arguments):
    return [sys.executable, "-m", "deploy.demo.demo", "--grpc-port", "0", "--http-port", "0", *arguments]


def environment(cache):
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}


def run(cache, *arguments):
    return subprocess.run(
        command(*arguments), env=environment(cache), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def filled(cache):
    """When the one feature store there was filled."""
    (catalogue,) = (cache / "pinrank" / "demo").glob("*/catalogue.json")
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
        "licence of the data",
        "60 users, 90 pins, 2,400 actions",
        "40 actions on record; newest first:",
        "Pin number",
        "related to",
        "milliseconds: wire",
        f"model ml1m@{STABLE}",
        "degraded: nothing",
    ):
        assert shown in first.stdout
    assert "call it yourself" not in first.stdout, "nobody answers there when it has ended"
    before = filled(cache)
    second = run(cache, "--once")
    assert second.returncode == 0
    assert "60 users" not in second.stdout
    assert filled(cache) == before


def own_actions(folder):
    """Sixty listeners of songs, with actions and a title that only this data has."""
    write_atomic(folder, name="songs", per_user=12)
    (folder / "actions.toml").write_text(
        '[[actions]]\nname = "replay"\nmeaning = "played again"\ncolumn = "rating"\nat_least = 4\naffinity = 1.0\n'
        '[[actions]]\nname = "listen"\nmeaning = "was played"\naffinity = 0.5\n'
    )
    items = folder / "songs.item"
    items.write_text(items.read_text().replace("Pin number", "[live] song"))
    return folder


@needs_training
def test_own_actions_are_trained_on_once_and_served(tmp_path):
    data = own_actions(tmp_path / "songs")
    quickly = "--train=--epochs 1 --negatives 2 --size encoder_layers=1"
    first = run(tmp_path, "--data", str(data), "--once", quickly)
    assert first.returncode == 0, first.stderr
    for shown in (
        "training one",
        "60 users, 90 pins, 720 actions",
        "replay (played again)",
        "[live] song",
        "model demo@1",
    ):
        assert shown in first.stdout
    assert "A rating of 5" not in first.stdout
    table = next((tmp_path / "pinrank" / "demo").glob("songs-*-models/utility.toml")).read_text()
    assert table.count('pinner = "1 * replay + 0.5 * listen"') == 2
    before = filled(tmp_path)
    second = run(tmp_path, "--data", str(data), "--once")
    assert second.returncode == 0, second.stderr
    assert "training one" not in second.stdout
    assert "model demo@1" in second.stdout
    assert filled(tmp_path) == before


def test_a_ranker_belongs_to_the_content_of_a_folder_not_to_its_name(tmp_path):
    first, same, other = (own_actions(tmp_path / name / "songs") for name in ("a", "b", "c"))
    with (other / "songs.inter").open("a") as more:
        more.write("u0\tp1\t5\t99999999\n")
    assert content_digest(first) == content_digest(same) != content_digest(other)


def test_a_utility_that_nobody_wrote_counts_what_speaks_for_a_pin():
    rules = [ActionRule(name=n, meaning="m", affinity=a) for n, a in (("save", 1.0), ("skip", 0.0), ("play", 0.25))]
    schema = ActionSchema(actions=tuple(rules))
    assert 'pinner = "1 * save + 0.25 * play"' in utility_by_affinity(schema, schema.heads)
    assert 'pinner = "skip"' in utility_by_affinity(schema, ["skip"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_stays_up_until_it_is_stopped_and_takes_its_server_along(cache, number):
    with subprocess.Popen(
        command(), env=environment(cache), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        shown = ""
        for line in process.stdout:
            shown += line
            if "Ctrl-C stops it" in line:
                break
        port = server_address(cache)
        users = cache / "pinrank" / "demo" / f"serving-{port}" / "users.json"
        assert len(json.loads(users.read_text())) == 60, "where `make load` finds the ids of what is served"
        asked = re.search(r"pinrank (model status --address \S+ --token-file \S+)", shown)
        assert asked is not None
        status = subprocess.run([PINRANK, *asked[1].split()], capture_output=True, text=True, check=False)
        assert f"stable: none -> {STABLE}" in status.stdout, status.stderr
        process.send_signal(number)
        assert process.stdout.read().strip().endswith("stopped")
        assert process.wait() == 0
        watchdog.cancel()
    assert port not in listening()
    assert not users.parent.is_symlink()


def test_data_that_is_not_there_is_a_clear_error(cache, tmp_path):
    refused = run(cache, "--data", str(tmp_path / "nothing"))
    assert refused.returncode == 1
    assert "nothing has no RecBole atomic files" in refused.stderr
    assert "Traceback" not in refused.stderr
