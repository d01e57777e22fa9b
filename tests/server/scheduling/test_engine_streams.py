from __future__ import annotations

import asyncio
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from kernels.cores import keep_to
from kernels.engine import EngineError, FeatureBatch
from server.errors import DeadlineError, ScoringError
from server.runtime.supervisor import Supervisor
from server.scheduling.admission import Admission, Ask
from server.scheduling.contract import WaitUntil
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from server.scheduling.engine_streams import Runner
from server.scheduling.lanes import Lane
from server.scheduling.pace import Pace
from server.telemetry.metrics import Metrics

PER_ROW_S = 1e-4
PACE = Pace()


class CountingEngine:
    """Scores a row by its own number; `during` is called in every run, on the engine's thread."""

    def __init__(self, during=lambda batch: None):
        self.during = during
        self.rows = []

    def run(self, batch):
        self.rows.append(batch.rows)
        self.during(batch)
        return batch.candidate["number"][:, None].astype(np.float32)


def runner_of(engine, streams=2, policy=None, supervisor=None, settle=lambda _: None, clock=time.monotonic):
    model = SimpleNamespace(engine=engine, digest="m")
    costs = {"m": CostModel(lambda rows: 1e-4 + PER_ROW_S * rows)}
    policy = EarliestDeadlineFirst(streams, costs.__getitem__) if policy is None else policy
    metrics = Metrics()
    runner = Runner(
        policy,
        Admission(policy, {}, 100, 100_000, 1 << 30),
        streams,
        costs,
        metrics.engine,
        PACE,
        supervisor or Supervisor(),
        clock=clock,
        settle=settle,
    )
    runner.start()
    return runner, model, metrics


def batch_of(rows, start=0):
    return FeatureBatch({}, {"number": np.arange(start, start + rows)}, np.array([0, rows], np.int32))


def in_30_s():
    return asyncio.get_running_loop().time() + 30


def admit(runner, rows, deadline_s):
    return runner.admit(Ask("home", rows, 0, deadline_s, "m", None)).ticket


async def score(runner, model, rows, deadline_s, start=0):
    ticket = admit(runner, rows, deadline_s)
    try:
        return await runner.score(ticket, model, batch_of(rows, start), deadline_s)
    finally:
        runner.release(ticket, 0)


def count(metrics, name):
    return metrics.registry.get_sample_value(f"pinrank_{name}_total")


async def test_pieces_of_a_request_run_at_once_and_come_back_in_its_order():
    both = threading.Barrier(2, timeout=30)  # each piece waits for the other: one after the other would never end
    engine = CountingEngine(lambda _: both.wait())
    runner, model, _ = runner_of(engine, streams=2)
    scored = await score(runner, model, 1000, in_30_s())
    assert sorted(engine.rows) == [500, 500]
    assert scored.logits[:, 0].tolist() == list(range(1000))
    runner.close()


async def test_many_requests_at_once_each_get_their_own_rows():
    runner, model, metrics = runner_of(CountingEngine(), streams=3)
    sizes = [1 + 37 * i % 211 for i in range(200)]
    waiting = [score(runner, model, rows, in_30_s(), start=1000 * i) for i, rows in enumerate(sizes)]
    for i, scored in enumerate(await asyncio.gather(*(waiting[:90]))):
        assert scored.logits[:, 0].tolist() == list(range(1000 * i, 1000 * i + sizes[i]))
    await asyncio.gather(*waiting[90:180])
    for coroutine in waiting[180:]:
        coroutine.close()
    assert runner.admission.requests == runner.admission.rows == 0
    assert count(metrics, "late_run_rows") == 0
    runner.close()
    assert runner.idle_streams == 3


async def test_what_runs_beside_requests_is_told_whether_they_take_half_of_the_streams():
    runner, _, _ = runner_of(CountingEngine(), streams=4)
    one = admit(runner, 10, in_30_s())
    assert not PACE.busy
    other = admit(runner, 10, in_30_s())
    assert PACE.busy
    runner.release(one, 0)
    assert not PACE.busy
    runner.release(other, 0)
    runner.close()


async def test_a_piece_that_fails_fails_its_request_and_no_other():
    def fail_large(batch):
        if batch.candidate["number"][0] >= 500:
            raise EngineError("told to fail")

    runner, model, _ = runner_of(CountingEngine(fail_large), streams=2)
    with pytest.raises(ScoringError, match="failed in a run of 500 rows"):
        await score(runner, model, 1000, in_30_s())
    assert (await score(runner, model, 10, in_30_s())).logits.shape == (10, 1)
    runner.close()


async def test_a_fault_of_the_engine_reaches_its_request_and_the_stream_lives_on():
    def divide(_):
        engine.during = lambda _: None
        raise ZeroDivisionError

    engine = CountingEngine(divide)
    runner, model, _ = runner_of(engine, streams=1)
    with pytest.raises(ZeroDivisionError):
        await score(runner, model, 10, in_30_s())
    assert (await score(runner, model, 10, in_30_s())).logits.shape == (10, 1)
    runner.close()


async def test_the_rest_of_a_cancelled_request_is_never_run():
    started, go_on = threading.Event(), threading.Event()

    def hold(_):
        started.set()
        go_on.wait(30)

    engine = CountingEngine(hold)
    runner, model, metrics = runner_of(engine, streams=1)
    blocking = asyncio.ensure_future(score(runner, model, 10, in_30_s()))
    await asyncio.to_thread(started.wait, 30)
    queued = asyncio.ensure_future(score(runner, model, 128, in_30_s()))
    await asyncio.sleep(0)
    assert runner.admission.requests == 2
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert runner.admission.requests == 1
    go_on.set()
    await blocking
    runner.close()
    assert engine.rows == [10]
    assert count(metrics, "cancelled_rows") == 128
    assert count(metrics, "late_run_rows") == 0


async def test_a_request_is_answered_at_its_deadline_while_the_engine_is_stuck():
    go_on = threading.Event()
    runner, model, metrics = runner_of(CountingEngine(lambda _: go_on.wait(30)), streams=1)
    with pytest.raises(DeadlineError):
        await score(runner, model, 10, asyncio.get_running_loop().time() + 0.02)
    assert count(metrics, "expired_rows") == 10
    go_on.set()
    runner.close()


class RunsFromTheSecondAskOn:
    """A policy that once wants to be asked again later."""

    def __init__(self):
        self.policy = EarliestDeadlineFirst(1, lambda _: CostModel(lambda *_: 1e-3))
        self.asked = []
        for name in ("reserve", "offer", "cancel", "finished", "forecast"):
            setattr(self, name, getattr(self.policy, name))

    def next(self, now_s):
        self.asked.append(now_s)
        return WaitUntil(now_s + 0.01) if len(self.asked) == 1 else self.policy.next(now_s)


async def test_a_policy_that_waits_is_asked_again_in_time():
    policy = RunsFromTheSecondAskOn()
    runner, model, _ = runner_of(CountingEngine(), streams=1, policy=policy)
    assert (await score(runner, model, 3, in_30_s())).logits.shape == (3, 1)
    assert policy.asked[1] >= policy.asked[0] + 0.009
    runner.close()


@pytest.mark.parametrize("broken", ["next", "finished", "observe"])
async def test_a_stream_that_a_bug_ends_is_started_again_and_its_requests_are_answered(broken, monkeypatch):
    supervisor = Supervisor()
    policy = EarliestDeadlineFirst(1, lambda _: CostModel(lambda _: 1e-3))
    runner, model, _ = runner_of(CountingEngine(), streams=1, policy=policy, supervisor=supervisor)
    owner = CostModel if broken == "observe" else policy
    works, main = getattr(owner, broken), threading.get_ident()

    def fails(*arguments):
        if threading.get_ident() == main:  # as the request is offered
            return works(*arguments)
        monkeypatch.setattr(owner, broken, works)
        raise KeyError("a bug")

    monkeypatch.setattr(owner, broken, fails)
    first = await asyncio.gather(score(runner, model, 3, in_30_s()), return_exceptions=True)
    if broken == "next":  # after its scores were there
        assert first[0].logits.shape == (3, 1)
    else:
        assert "an engine stream failed during a run: KeyError" in str(first[0])
    assert (await score(runner, model, 4, in_30_s())).logits.shape == (4, 1)
    assert runner.runs(model) == 0
    (one,) = supervisor.background
    assert (one.name, one.failures, one.restarts) == ("engine-0", 1, 1)
    runner.close()


async def test_an_engine_that_ends_its_thread_or_loses_rows_fails_the_run_alone():
    engine = CountingEngine()
    runner, model, _ = runner_of(engine, streams=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run", lambda batch: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(ScoringError, match="the engine raised SystemExit"):
            await score(runner, model, 3, in_30_s())
        patch.setattr(engine, "run", lambda batch: np.zeros((batch.rows - 1, 1), np.float32))
        with pytest.raises(ScoringError, match="the engine failed in a run of 3 rows") as lost:
            await score(runner, model, 3, in_30_s())
        assert "the engine returned 2 rows for 3" in str(lost.value.__cause__)
    assert (await score(runner, model, 3, in_30_s())).logits.shape == (3, 1)
    runner.close()


async def test_each_stream_settles_before_it_runs():
    core, found = max(os.sched_getaffinity(0)), []
    runner, model, _ = runner_of(
        CountingEngine(lambda _: found.append(os.sched_getaffinity(0))), 1, settle=lambda _: keep_to(core)
    )
    await score(runner, model, 10, in_30_s())
    runner.close()
    assert found == [{core}]
    assert core in os.sched_getaffinity(0)


async def test_the_event_loop_rests_only_while_every_stream_has_two_more_runs_ahead():
    begun, going_on = threading.Event(), threading.Event()

    def during(_):
        begun.set()
        going_on.wait(30)

    runner, model, metrics = runner_of(CountingEngine(during), streams=1)
    scored = [asyncio.ensure_future(score(runner, model, 100, in_30_s()))]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(begun.wait, 30), "the only stream is busy"
    for ahead, rests in ((1, False), (2, True)):
        scored.append(asyncio.ensure_future(score(runner, model, 100, in_30_s())))
        for _ in range(4):
            await asyncio.sleep(0)
        assert (count(metrics, "loop_rest_seconds") > 0) == rests, ahead
    going_on.set()
    await asyncio.gather(*scored)
    runner.close()


async def test_the_event_loop_does_not_rest_for_a_request_that_goes_before_those_that_wait():
    begun, going_on, ahead_s = threading.Event(), threading.Event(), 0.0

    def during(_):
        begun.set()
        going_on.wait(30)

    costs = {"m": CostModel(lambda rows: 1e-4 + PER_ROW_S * rows)}
    lanes = {"home": Lane(priority=0, share=0.5), "bulk": Lane(priority=-1, share=0.5)}
    policy = EarliestDeadlineFirst(1, costs.__getitem__, lanes)
    runner, model, metrics = runner_of(CountingEngine(during), 1, policy, clock=lambda: time.monotonic() + ahead_s)
    scored = []

    async def offer(surface):
        ticket = runner.admit(Ask(surface, 100, 0, in_30_s(), "m", None)).ticket
        scored.append(asyncio.ensure_future(runner.score(ticket, model, batch_of(100), in_30_s())))
        for _ in range(4):
            await asyncio.sleep(0)

    await offer("bulk")
    assert await asyncio.to_thread(begun.wait, 30)
    ahead_s = 1.0  # the run should have ended long ago: whatever goes first begins at once
    for _ in range(3):
        await offer("bulk")
    rested_s = count(metrics, "loop_rest_seconds")
    assert rested_s > 0
    await offer("home")
    assert count(metrics, "loop_rest_seconds") == rested_s
    await offer("bulk")
    assert count(metrics, "loop_rest_seconds") > rested_s
    going_on.set()
    await asyncio.gather(*scored)
    runner.close()
