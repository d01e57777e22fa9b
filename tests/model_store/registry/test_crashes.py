"""Writers killed at every step that changes a file: no lost good version, no half-visible one, no label to nowhere."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_store.registry.store import open_model_store
from tests import tiny

NEVER = 10**9


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for version in range(1, 31):
        tiny.write_tiny_bundle(folder / str(version), version)
    return folder


@contextmanager
def worker(bundles, volume="links"):
    command = [sys.executable, "-m", "tests.model_store.crashing", str(bundles), volume]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    ) as process:
        yield process
        process.stdin.close()
        assert process.wait(10) == 0


def begin(process, root, operation, step=NEVER, **arguments):
    process.stdin.write(json.dumps([str(root), operation, arguments, step]) + "\n")
    process.stdin.flush()


def ended(process):
    return json.loads(process.stdout.readline())


def do(process, root, operation, step=NEVER, **arguments):
    begin(process, root, operation, step, **arguments)
    return ended(process)


def sound(root):
    """Return the state of a store after checking all that must hold whatever was killed."""
    store = open_model_store(root)
    history = store.history("tiny")
    assert [entry.number for entry in history] == list(range(1, len(history) + 1))
    for entry in history:
        assert set(entry.state.labels.values()) <= set(entry.state.versions)
    state = store.state("tiny")
    for version in state.versions:
        assert store.read("tiny", version).manifest.version == version
    return state


@pytest.mark.parametrize(
    ("operation", "volume"),
    [
        *((operation, "links") for operation in ("first publish", "publish", "label", "rollback", "gc")),
        ("label", "renames"),
        ("label", "turns"),
    ],
)
def test_killed_at_any_step_an_operation_was_done_or_not_at_all_and_can_be_done_again(
    tmp_path, bundles, operation, volume
):
    what, arguments, holds = {
        "first publish": ("publish", {"version": 1}, lambda state: set(state.versions) == {1}),
        "publish": ("publish", {"version": 4}, lambda state: set(state.versions) == {1, 2, 3, 4}),
        "label": ("label", {"label": "stable", "version": 3}, lambda state: state.labels == {"stable": 3}),
        "rollback": ("rollback", {"label": "stable"}, lambda state: state.labels["stable"] in {1, 2}),
        "gc": ("gc", {"keep": 0}, lambda state: set(state.versions) == {2}),
    }[operation]
    kills = 0
    with worker(bundles, volume) as process:
        if operation != "first publish":
            for version in (1, 2, 3):
                do(process, tmp_path / "good", "publish", version=version)
            for version in (1, 2):
                do(process, tmp_path / "good", "label", label="stable", version=version)
        while True:
            root = tmp_path / str(kills)
            if operation != "first publish":
                shutil.copytree(tmp_path / "good", root)
            before = sound(root)
            killed = do(process, root, what, kills, **arguments)["killed"]
            after = sound(root)
            assert set(before.versions) - ({1, 3} if operation == "gc" else set()) <= set(after.versions)
            if not killed:
                break
            kills += 1
            assert not do(process, root, what, **arguments)["killed"]
            assert holds(sound(root))
    assert kills > 10


@pytest.mark.parametrize("volume", ["renames", "turns"])
def test_of_writers_at_once_on_a_volume_without_links_none_is_lost(tmp_path, bundles, volume):
    root = tmp_path / "store"
    with worker(bundles, volume) as a, worker(bundles, volume) as b, worker(bundles, volume) as c:
        do(a, root, "publish", version=1)
        for i in range(10):
            for process in (a, b, c):
                begin(process, root, "label", label=f"of-{process.pid}-{i}", version=1)
            for process in (a, b, c):
                assert not ended(process)["killed"]
    state = sound(root)
    assert len(state.labels) == 30


def test_500_kills_of_publishers_movers_and_collectors_at_once(tmp_path, bundles):
    """Four writers at a time, each operation killed at a random step, until 500 were; what was answered stays."""
    root, rng = tmp_path / "store", random.Random(7)
    kills, published, answered = 0, set(), 0
    with worker(bundles) as a, worker(bundles) as b, worker(bundles) as c, worker(bundles) as d:
        do(a, root, "publish", version=1)
        do(a, root, "label", label="stable", version=1)
        labelled = {"stable", "canary"}
        while kills < 500:
            free = sorted(published) or [1]
            plans = [
                (a, "publish", rng.randrange(60), {"version": rng.randint(1, 30)}),
                (b, "label", rng.randrange(16), {"label": rng.choice(sorted(labelled)), "version": rng.choice(free)}),
                (c, "label", rng.randrange(16), {"label": rng.choice(sorted(labelled)), "version": rng.choice(free)}),
                (d, "gc", rng.randrange(40), {"keep": 20}),
            ]
            if rng.random() < 0.9:  # collecting takes away young files here: no publish may run beside it
                del plans[3]
            else:
                del plans[0]
            for process, operation, step, arguments in plans:
                begin(process, root, operation, step, **arguments)
            for process, operation, _, arguments in plans:
                answer = ended(process)
                kills += answer["killed"]
                if not answer["killed"]:
                    answered += 1
                    if operation == "publish" and not answer["done"].startswith("refused"):
                        published.add(arguments["version"])
            state = open_model_store(root).state("tiny")
            assert set(state.labels.values()) <= set(state.versions)
            assert published <= set(state.versions) | set(state.retired)
    state = sound(root)
    assert published <= set(state.versions) | set(state.retired)
    assert answered > 50
    assert open_model_store(root).gc("tiny", keep=100, grace_s=0).unfinished >= 0
    assert not list(root.rglob(".unfinished-*"))
