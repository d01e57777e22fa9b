"""Warm-ups: told of while they last, bounded, and ended with the server; by an engine whose shapes wait at a gate."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kernels.cost import warm_and_measure
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import EngineError, WarmedUp
from server.app import Server
from server.proving.warm_up import WarmUp
from tests.conftest import changed, eventually
from tests.server.api.test_protocols import get
from tests.server.swapping import held, publish, sample

SHAPES = ((1, 1),) * 40
#: With one stream: the shapes, and each of four sizes three times.
RUNS = 52


class Shaped(NumpyEngine):
    """An engine with shapes to warm up; run 20 of a warm-up waits for the gate."""

    gate = threading.Event()
    at_the_gate = threading.Event()
    shapes = SHAPES
    failure: EngineError | None = None

    def warm_up(self, batch, progress):
        runs = 0

        def run(tiled):
            nonlocal runs
            runs += 1
            if runs == 21:
                self.at_the_gate.set()
                assert self.gate.wait(30)
            if self.failure is not None:
                raise self.failure
            return self.run(tiled)

        done, self._cost = warm_and_measure(run, 1, batch, progress, self.shapes)
        return done


@pytest.fixture
def engine(monkeypatch):
    class Own(Shaped):
        gate, at_the_gate = threading.Event(), threading.Event()

    Own.gate.set()
    monkeypatch.setattr("server.app.engine_factory", lambda *_: Own)
    yield Own
    Own.gate.set()


def lines(body):
    return [line for line in body.splitlines() if "version" in line]


async def test_a_start_says_in_healthz_and_metrics_how_far_its_warm_up_is(engine, config, store, prover):
    server = Server(changed(config, {"model_store": store.where, "labels": ("stable",)}), prover=prover)
    engine.gate.clear()
    starting = asyncio.create_task(server.start())
    await eventually(engine.at_the_gate.is_set, 30)
    status, body = await get(server, "/healthz")
    assert (status, body.splitlines()[0]) == (503, "not serving")
    assert lines(body) == [f"stable: warming up version 1, 20 of {RUNS} runs"]
    _, told = await get(server, "/metrics")
    assert 'pinrank_model_warm_up_runs{state="done",version="1"} 20.0' in told
    assert f'pinrank_model_warm_up_runs{{state="left",version="1"}} {RUNS - 20}.0' in told
    assert 'pinrank_model_warm_up_seconds{version="1"}' in told
    engine.gate.set()
    await starting
    status, body = await get(server, "/healthz")
    assert (status, lines(body)) == (200, [])
    assert sample(server, "pinrank_model_warm_up_runs", version="1", state="left") == 0
    assert sample(server, "pinrank_model_warm_ups_cut_off_total") == 0
    await server.drain_and_close()


async def test_a_start_that_proves_says_so(config, store, prover, monkeypatch):
    asked, answer = threading.Event(), threading.Event()
    prove = prover.prove

    def waiting(*arguments):
        asked.set()
        assert answer.wait(30)
        return prove(*arguments)

    monkeypatch.setattr(prover, "prove", waiting)
    server = Server(changed(config, {"model_store": store.where, "labels": ("stable",)}), prover=prover)
    starting = asyncio.create_task(server.start())
    await eventually(asked.is_set, 30)
    status, body = await get(server, "/healthz")
    answer.set()
    assert (status, lines(body)) == (503, ["stable: proving version 1"])
    await starting
    await server.drain_and_close()


async def test_a_warm_up_that_takes_too_long_is_cut_off_openly_and_the_version_serves(engine, serve, calls, capfd):
    server = await serve(swap={"warm_up_s_max": 1e-9}, labels=("stable",))
    assert await calls(server).version() == 1
    assert (
        sample(server, "pinrank_model_warm_up_runs", version="1", state="left") == len(SHAPES) - 1
    )  # no time is over before the first run
    assert sample(server, "pinrank_model_warm_ups_cut_off_total") == 1
    assert server.status.default.model.engine.cost_s(128) > 0
    (version,) = (await calls(server).status()).versions
    assert version.checks[-1].startswith("warm-up: cut off after")
    assert f"13 of {RUNS} runs" in version.checks[-1]
    logged = capfd.readouterr().out
    assert "warm_up_started" in logged
    assert "warm_up_cut_off" in logged
    assert f"left={len(SHAPES) - 1}" in logged


async def test_a_server_that_stops_ends_a_warm_up_at_its_next_run(engine, config, store, prover):
    server = Server(changed(config, {"model_store": store.where, "labels": ("stable",)}), prover=prover)
    engine.gate.clear()
    engine.shapes = ((1, 1),) * 1_000_000
    before = set(threading.enumerate())
    starting = asyncio.create_task(server.start())
    await eventually(engine.at_the_gate.is_set, 30)
    starting.cancel()
    await eventually(lambda: server.admitter.closed)
    engine.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "model-loader"]


async def test_a_swap_says_how_far_its_warm_up_is_while_the_version_before_answers(
    engine, serve, calls, store, tmp_path
):
    server = await serve(labels=("stable",))
    call = calls(server)
    await call.rank()
    engine.at_the_gate.clear()
    engine.gate.clear()
    publish(store, tmp_path, 2)
    store.set_label("tiny", "not-served-here", 2)
    store.set_label("tiny", "stable", 2)
    await eventually(engine.at_the_gate.is_set, 30)
    status, body = await get(server, "/healthz")
    assert (status, lines(body)[0]) == (200, f"stable: warming up version 2, 20 of {RUNS} runs")
    assert await call.version() == 1
    assert {one.version: one.checks[-1] for one in (await call.status()).versions}[2] == f"warm-up: 20 of {RUNS} runs"
    engine.gate.set()
    await eventually(lambda: held(server, 2) == "serving", 30)


async def test_a_warm_up_on_recent_requests_that_fails_is_the_bundles_fault_and_quotes_nothing(
    engine, serve, calls, store, tmp_path
):
    server = await serve(labels=("stable",))
    call = calls(server)
    await call.rank()
    engine.failure = EngineError("row 987654 of a user")
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 2) == "failed", 30)
    assert await call.reason(2) == "tiny@2: EngineError during the warm-up on recent requests"
    assert sample(server, "pinrank_model_swaps_total", outcome="failed_bundle") == 1
    assert await call.version() == 1


def test_a_warm_up_is_bounded_from_its_beginning_and_told_every_few_seconds(capfd):
    now_s = 100.0
    warm_up = WarmUp("tiny@1", 12.0, lambda: now_s)
    assert str(warm_up) == "0 of 0 runs"
    found = []
    for runs in range(8):
        found.append(warm_up.progress(runs, 10))
        now_s += 2.0
    assert found == [True] * 6 + [False] * 2
    assert warm_up.ended(WarmedUp(9, 10)).startswith("warm-up: cut off after 14 s (swap.warm_up_s_max), 9 of 10 runs")
    assert (warm_up.runs, warm_up.of, warm_up.cut_off) == (9, 10, True)
    logged = capfd.readouterr().out
    assert logged.count("warm_up_started") == 1
    assert logged.count("warm_up_goes_on") == 2
