"""Background work that fails: noted, shown, started again, and never the end of what heals the server."""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import threading

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from model_store.registry.entries import whoami
from model_store.registry.store import open_model_store
from server.cli.main import app
from server.rollout.installed_models import InstalledModels
from server.runtime.supervisor import Backoff, RestartAt, Supervisor
from server.telemetry.histograms import Histograms
from tests.conftest import eventually
from tests.processes import children
from tests.server.api.test_protocols import get
from tests.server.proving.test_prover import endless
from tests.server.swapping import publish, sample

AT_ONCE = Backoff(first_s=0.0)


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_good_while():
    backoff = Backoff(first_s=1.0, longest_s=5.0, well_s=60.0)
    row, pauses = 0, []
    for _ in range(5):
        row, restart = backoff.after_failure(row, started_s=100.0, now_s=100.0)
        pauses.append(restart.time_s - 100.0)
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.after_failure(row, started_s=100.0, now_s=160.0) == (1, RestartAt(161.0))
    assert backoff.after_failure(10**6, started_s=0.0, now_s=0.0)[1] == RestartAt(5.0)


async def test_a_loop_that_raises_runs_again_until_it_is_cancelled():
    supervisor, tries = Supervisor(AT_ONCE, lambda: 100.0), []

    async def work():
        tries.append(1)
        if len(tries) < 3:
            raise KeyError("a secret")
        await asyncio.Event().wait()

    task = asyncio.create_task(supervisor.loop("one", work))
    await eventually(lambda: len(tries) == 3)
    (one,) = supervisor.background
    assert (one.state, one.failures, one.restarts, one.last_error) == ("running", 2, 2, "KeyError")
    assert supervisor.lines()[0].startswith("one: running, failures 2, restarts 2, last KeyError 0 s ago")
    assert "secret" not in supervisor.lines()[0]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert one.state == "ended"


async def test_a_task_that_raises_is_counted_and_others_of_its_name_too():
    supervisor = Supervisor()

    async def work():
        raise ValueError

    await asyncio.gather(*(supervisor.task("load", work()) for _ in range(3)))
    (one,) = supervisor.background
    assert (one.state, one.failures) == ("idle", 3)


def test_a_thread_that_raises_anything_runs_again_and_ends_when_it_returns():
    supervisor, tries = Supervisor(AT_ONCE), []

    def work():
        tries.append(1)
        if len(tries) < 3:
            raise SystemExit

    thread = supervisor.thread("engine", work)
    thread.start()
    thread.join(10)
    assert len(tries) == 3
    assert (supervisor.background[0].state, supervisor.background[0].failures) == ("ended", 2)


def test_a_thread_that_waits_to_be_started_again_ends_when_the_supervisor_closes():
    supervisor, failed = Supervisor(Backoff(first_s=600)), threading.Event()

    def work():
        failed.set()
        raise OSError

    thread = supervisor.thread("engine", work)
    thread.start()
    failed.wait(10)
    supervisor.close()
    thread.join(10)
    assert not thread.is_alive()


async def test_what_fails_on_the_event_loop_and_is_nobodys_is_counted():
    supervisor = Supervisor()
    loop = asyncio.get_running_loop()
    supervisor.catch_strays(loop)
    loop.call_soon(lambda: 1 / 0)
    await eventually(lambda: supervisor.background[0].failures == 1)
    assert supervisor.background[0].last_error == "ZeroDivisionError"
    loop.set_exception_handler(None)


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 10001"), OSError("No username set")])
def test_a_user_without_a_name_is_named_by_number(error, monkeypatch, store):
    def nobody():
        raise error

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert whoami().startswith(f"uid-{os.getuid()}@")
    moved = CliRunner().invoke(app, ["model", "label", "tiny", "beta", "1", "--store", store.where])
    assert moved.exit_code == 0, moved.output
    assert open_model_store(store.where).head("tiny").by == whoami()


async def test_a_prover_that_is_killed_is_counted_and_its_version_is_tried_again(serve, store, tmp_path, prover):
    server = await serve(engine="numpy")
    publish(store, tmp_path, 2, **{"network.onnx": endless()})
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: bool(children(prover.helper_pid)), 30)
    os.kill(prover.helper_pid, signal.SIGKILL)
    await eventually(lambda: sample(server, "pinrank_background_failures_total", name="prover") == 1, 30)
    await eventually(lambda: bool(prover.helper_pid and children(prover.helper_pid)), 30)
    os.kill(children(prover.helper_pid)[0], signal.SIGSEGV)
    await eventually(lambda: "SIGSEGV" in server.status.versions[2].reason, 30)


async def test_a_watch_that_fails_goes_on_and_shows_in_healthz_and_metrics(serve, store, tmp_path, monkeypatch):
    server = await serve()

    def head(model):
        monkeypatch.undo()
        raise KeyError("a bug")

    monkeypatch.setattr(server.model_store, "head", head)
    await eventually(lambda: sample(server, "pinrank_background_failures_total", name="model-watch") == 1)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server.status.default.version == 2, 30)
    assert sample(server, "pinrank_background_failures_total", name="model-watch") == 1
    assert sample(server, "pinrank_background_waiting", name="model-watch") == 0
    status, body = await get(server, "/healthz")
    assert (status, body.splitlines()[0]) == (200, "serving")
    lines = {line.partition(":")[0]: line for line in body.splitlines()[1:]}
    assert lines.keys() >= {"engine-0", "engine-1", "http", "label-guard", "model-watch"}
    assert "running, failures 1, restarts 1, last KeyError" in lines["model-watch"]


async def test_a_guard_that_fails_does_not_keep_labels_from_being_followed(serve, store, tmp_path, monkeypatch):
    server = await serve()

    async def breaches():
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.swap.guard, "breaches", breaches)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server.status.default.version == 2, 30)
    await eventually(lambda: sample(server, "pinrank_background_failures_total", name="label-guard") > 0, 30)


async def test_an_intake_that_a_bug_ends_fails_its_version_and_the_next_one_is_taken_in(
    serve, store, tmp_path, monkeypatch
):
    server = await serve()
    install = InstalledModels.install
    monkeypatch.setattr(InstalledModels, "install", lambda self, served: 1 / 0)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: sample(server, "pinrank_model_swaps_total", outcome="failed_unexpected") == 1, 30)
    monkeypatch.setattr(InstalledModels, "install", install)
    publish(store, tmp_path, 3)
    store.set_label("tiny", "stable", 3)
    await eventually(lambda: server.status.default.version == 3, 30)


async def test_a_collector_that_fails_hides_no_other_metric(server, monkeypatch):
    monkeypatch.setattr("server.request.routing.drifts", lambda *_: 1 / 0)
    status, body = await get(server, "/metrics")
    assert status == 200
    assert "pinrank_near_cache_rows" in body
    assert "pinrank_model_phase" not in body
    assert sample(server, "pinrank_background_failures_total", name="metrics") >= 1


def test_values_that_many_threads_fold_at_once_are_counted_once(monkeypatch):
    monkeypatch.setattr("server.telemetry.histograms._FOLD_AT", 3)
    histograms = Histograms("seconds", "of a test", None, (0.5, 1.0), CollectorRegistry())

    def observe():
        for _ in range(20_000):
            histograms.observe(0.25)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (family,) = histograms.collect()
    assert [s.value for s in family.samples if s.name == "seconds_sum"] == [20_000.0]


def test_values_of_several_labels_are_counted_under_each(monkeypatch):
    monkeypatch.setattr("server.telemetry.histograms._SORT_AT", 3)
    histograms = Histograms("seconds", "of a test", "stage", (0.5, 1.0), CollectorRegistry())
    for _ in range(4):
        histograms.observe_each({"fetch": 0.25, "score": 0.75})
    histograms.observe(2.0, "score")
    (family,) = histograms.collect()
    sums = {s.labels["stage"]: s.value for s in family.samples if s.name == "seconds_sum"}
    assert sums == {"fetch": 1.0, "score": 5.0}
