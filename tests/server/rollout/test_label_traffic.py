"""Who is answered by which label, what is only compared, and what is taken back."""

from __future__ import annotations

import collections
import getpass

import grpc
import numpy as np
import onnx
import pytest

from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.statistics import Distribution, Statistics
from server.config_sections import GuardConfig, ShadowConfig
from tests import tiny
from tests.conftest import eventually
from tests.server.swapping import ALIKE, held, own_golden, publish, sample


async def test_users_stay_with_their_label_and_growing_a_share_takes_nobody_from_it(serve, calls, store, tmp_path):
    server = await serve(guard=GuardConfig(enabled=False))
    call = calls(server)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server.status.by_label, 30)

    async def on_canary(share):
        store.set_traffic("tiny", "*", "canary", share)
        number = store.head("tiny").number
        server.swap.newest.poll_now()
        await eventually(lambda: server.status.entry.number == number)
        return {user for user in range(400) if await call.version(user=user, pins=[1, 2]) == 2}

    few, again, more, none = [await on_canary(share) for share in (0.1, 0.1, 0.4, 0.0)]
    assert few == again
    assert few < more
    assert none == set()
    assert 20 < len(few) < 65
    assert 120 < len(more) < 200
    assert await call.version(label="canary") == 2


async def test_the_shadow_is_compared_and_answers_nobody(serve, calls, store, tmp_path):
    server = await serve(shadow=ShadowConfig(share=1.0))
    call = calls(server)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "shadow", 2)
    await eventually(lambda: "shadow" in server.status.by_label, 30)
    for user in (1, 2, 3, 4) * 5:
        assert await call.version(user=user) == 1
        await eventually(lambda: not server.status.comparing)
    shadow = (await call.status()).shadow
    assert (shadow.version, shadow.requests, shadow.failed) == (2, 20, 0)
    assert 0 <= shadow.top_10_overlap < 1  # another network, another order
    assert {head.head for head in shadow.heads} == {"save", "hide"}
    assert max(head.psi for head in shadow.heads) > 0.1
    assert sample(server, "pinrank_shadow_requests_total", outcome="compared") == 20
    assert sample(server, "pinrank_requests_total", surface="home", code="OK") == 20
    store.set_label("tiny", "shadow", 1)  # the same as what answers: nothing to compare
    await eventually(lambda: held(server, 2) == "gone", 30)


class FailingLater(NumpyEngine):
    """Fails requests, not proofs, once told."""

    failing: frozenset[int] = frozenset()

    def __init__(self, network, inputs, heads, streams=1, *, plan=None):
        super().__init__(network, inputs, heads, streams, plan=plan)
        self._own = network

    def run(self, batch):
        if self._own in self.failing:
            from kernels.engine import EngineError

            raise EngineError("told to fail")
        return super().run(batch)


GUARD = GuardConfig(requests_min=20, psi_max=0.8, p99_ratio_max=1_000)


@pytest.mark.parametrize("breach", ["errors", "drift"])
async def test_a_canary_that_breaches_its_guard_is_rolled_back_for_everybody_with_the_reason(
    breach, serve, calls, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("server.app.engine_factory", lambda *_: FailingLater)

    def nobody():  # as in a container whose user id has no name
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr(getpass, "getuser", nobody)
    network = ALIKE if breach == "errors" else tiny.network(seed=3)
    if breach == "errors":  # another file with the same content in other words
        model = onnx.load_model_from_string(ALIKE)
        model.producer_name = "another"
        network = model.SerializeToString()
    server = await serve(guard=GUARD)
    call = calls(server)
    publish(store, tmp_path, 2, **own_golden(network))
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server.status.by_label, 30)
    store.set_traffic("tiny", "*", "canary", 0.5)
    server.swap.newest.poll_now()
    await eventually(lambda: bool(server.status.traffic))
    if breach == "errors":
        monkeypatch.setattr(FailingLater, "failing", frozenset({network}))
    outcomes = collections.Counter()
    for user in range(10_000):
        try:
            outcomes[await call.version(user=user)] += 1
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.INTERNAL  # noqa: PT017
            outcomes["failed"] += 1
        if store.labels("tiny")["canary"] == 1:
            break
        server.swap.newest.poll_now()
    entry = store.head("tiny")
    assert entry.by.startswith("guard of uid-")
    assert entry.why.startswith("rolled back from 2: ")
    assert {"errors": "of its requests failed", "drift": "probabilities differ from the default"}[breach] in entry.why
    await eventually(lambda: held(server, 2) == "gone", 30)
    assert sample(server, "pinrank_model_rollbacks_total", label="canary") == 1
    for user in range(40):
        assert await call.version(user=user) == 1


async def test_drift_from_the_training_is_a_metric(serve, calls, store, tmp_path):
    """Trained on pins as popular as these, and on probabilities that nothing gives any more."""
    rng = np.random.default_rng(0)
    trained = Statistics(
        rows=1_000,
        inputs={"pin_core.popularity": Distribution.of(rng.uniform(size=1_000)), "gone.field": Distribution.of([1.0])},
        heads={"save": Distribution.of(rng.uniform(0.98, 0.99, 1_000)), "other": Distribution.of([0.5])},
    )
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2, **{"statistics.json": trained.model_dump_json().encode()})
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server.status.default.version == 2, 30)
    assert (
        sample(server, "pinrank_model_drift_psi", version="2", kind="head", name="save") == 0
    )  # nothing was asked yet
    for _ in range(20):
        await call.rank(pins=range(1, 51))
    assert sample(server, "pinrank_model_drift_psi", version="2", kind="head", name="save") > 1
    assert 0 < sample(server, "pinrank_model_drift_psi", version="2", kind="input", name="pin_core.popularity") < 1
    drifts = server.metrics.registry.get_sample_value
    assert drifts("pinrank_model_drift_psi", {"version": "2", "kind": "input", "name": "gone.field"}) is None
    assert sample(server, "pinrank_model_phase", version="2", phase="serving") == 1
