"""A model store that hangs, as a network volume does that is away: what is served stays, and the server still ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from model_store.registry.objects import ModelStoreError
from server.runtime.supervisor import Supervisor
from server.runtime.worker import Worker
from tests.conftest import eventually
from tests.server.swapping import publish, sample

HANGING = """
import sys, threading
from pathlib import Path
from model_store.registry.folder_objects import FolderObjects
listed, gate = FolderObjects.listed, Path(sys.argv.pop(1))
def hanging(self, *arguments):
    if gate.exists():
        print('{"event": "hangs"}', file=sys.stderr, flush=True)
        threading.Event().wait()
    return listed(self, *arguments)
FolderObjects.listed = hanging
from server.cli.main import app
app()
"""


@pytest.fixture
def hanging_server(model_store, feature_store_url, tmp_path):
    """Start a server whose looks at its store never end once a file is there."""
    running = []

    def start(**settings):
        command = [
            sys.executable, "-c", HANGING, str(tmp_path / "gate"), "serve", "--model-store", str(model_store),
            "--model", "tiny", "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
        ]  # fmt: skip
        environment = {**os.environ, "PINRANK_SWAP__POLL_S": "0.05", **settings}
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


def until(process, event):
    for line in process.stderr:
        if json.loads(line)["event"] == event:
            return
    raise AssertionError(f"the server ended with {process.wait()}")


def test_a_server_whose_look_at_the_store_hangs_drains_and_ends(hanging_server, tmp_path):
    process = hanging_server()
    until(process, "serving")
    (tmp_path / "gate").touch()
    until(process, "hangs")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert [json.loads(line)["event"] for line in process.stderr] == ["draining", "thread_left_behind", "stopped"]


def test_a_server_that_hangs_at_its_start_ends_when_it_is_told_to(hanging_server, tmp_path):
    (tmp_path / "gate").touch()
    process = hanging_server()
    until(process, "hangs")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_store_that_does_not_answer_at_the_start_is_named(hanging_server, tmp_path):
    (tmp_path / "gate").touch()
    process = hanging_server(PINRANK_SWAP__STORE_TIMEOUT_S="0.2")
    until(process, "hangs")
    assert process.wait(60) == 1
    assert "has not answered for 0.2 s" in process.stderr.read()


async def test_a_look_that_hangs_is_a_failed_look_and_labels_are_followed_once_it_ends(
    serve, calls, store, tmp_path, monkeypatch
):
    server = await serve(swap={"store_timeout_s": 0.1})
    call = calls(server)
    gate = threading.Event()

    def head(model):
        gate.wait()
        return store.head(model)

    monkeypatch.setattr(server.model_store, "head", head)
    await eventually(lambda: bool(server.status.store_failure), 30)
    assert "has not answered for 0.1 s" in (await call.status()).store_failure
    assert await call.version() == 1
    assert sample(server, "pinrank_model_store_failures_total") >= 1
    gate.set()
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server.status.default.version == 2, 30)
    assert server.status.store_failure == ""


async def test_work_that_nobody_waits_for_any_more_is_not_begun():
    worker, begun, gate, done = Worker("one", Supervisor()), threading.Event(), threading.Event(), []
    first = asyncio.create_task(worker.do(lambda: (begun.set(), gate.wait())))
    await eventually(begun.is_set)  # the task and its thread take turns as they like
    with pytest.raises(ModelStoreError, match="has not answered for 0 s"):
        await worker.ask(0.0, done.append, 1)
    gate.set()
    await first
    assert await worker.do(lambda: len(done)) == 0
    with pytest.raises(TimeoutError):  # the work's own
        await worker.ask(30.0, lambda: (_ for _ in ()).throw(TimeoutError))
    await worker.close(30.0)


def test_a_process_that_cannot_end_is_ended():
    script = (
        "import threading, server.runtime.signals\n"
        "threading.Thread(target=threading.Event().wait, name='engine-0').start()\n"
        "server.runtime.signals.exit_within(0.1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "exit_forced" in ended.stdout + ended.stderr
    assert "engine-0" in ended.stdout + ended.stderr
