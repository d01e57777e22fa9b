from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np

from kernels.engine import FeatureBatch
from server.batching import Idle, Run, WaitUntil
from server.metrics import Metrics
from server.runner import Runner


class RunsFromTheSecondAskOn:
    """A policy that once wants to be asked again later."""

    def __init__(self):
        self.waiting = []
        self.asked = []

    def offer(self, ticket):
        self.waiting.append(ticket)

    def cancel(self, ticket):
        self.waiting.remove(ticket)

    def next(self, now_s):
        self.asked.append(now_s)
        if not self.waiting:
            return Idle()
        if len(self.asked) == 1:
            return WaitUntil(now_s + 0.01)
        return Run((self.waiting.pop(),))


async def test_policy_that_waits_is_asked_again_in_time():
    engine = SimpleNamespace(run=lambda batch: np.zeros((batch.rows, 1), np.float32), cost_s=lambda *_: 0.0)
    model = SimpleNamespace(engine=engine, digest="a")
    policy = RunsFromTheSecondAskOn()
    runner = Runner(policy, streams=1, metrics=Metrics())
    deadline_s = asyncio.get_running_loop().time() + 30
    scored = await runner.score(model, FeatureBatch({}, {}, np.array([0, 3], np.int32)), deadline_s)
    assert scored.logits.shape == (3, 1)
    assert policy.asked[1] >= policy.asked[0] + 0.009
    runner.close()
