"""Which GPUs servers compute on; what would need one is the engine's factory, which here computes in NumPy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import SecretStr

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import UnavailableError
from server.config import ServerConfig
from server.processes import settings_of
from tests.conftest import eventually
from tests.server.swapping import held, publish, sample


async def test_every_version_is_compiled_for_all_devices_and_proven_on_the_first(
    serve, calls, store, tmp_path, prover, monkeypatch
):
    opened, proven, prove = [], [], prover.prove

    def factory(name, devices, _products):
        opened.append((name, devices))

        def engine(network, inputs, heads, streams, *, plan=None):
            return NumpyEngine(network, inputs, heads, streams * len(devices), plan=plan)

        return engine

    def on_the_processor(bundle, limits, sample):
        proven.append((bundle.manifest.version, limits.engine, limits.device))
        return prove(bundle, replace(limits, engine="numpy", device=0), sample)

    monkeypatch.setattr("server.app.engine_factory", factory)
    monkeypatch.setattr(prover, "prove", on_the_processor)
    server = await serve(engine="torch", device=[2, 5], engine_streams=0, labels=("stable",))
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 2) == "serving", 30)
    assert await calls(server).version() == 2
    assert opened == [("torch", (2, 5))]
    assert proven == [(1, "torch", 2), (2, "torch", 2)]
    assert server.status.default.model.engine.streams == server.status.idle_streams == 6  # three on each


async def test_a_device_that_went_is_not_the_bundles_fault_and_the_version_is_tried_again(
    serve, calls, store, tmp_path, monkeypatch
):
    gone = False

    def engine(*arguments, **options):
        if gone:
            raise UnavailableError("there is no CUDA device 0")
        return NumpyEngine(*arguments, **options)

    monkeypatch.setattr("server.app.engine_factory", lambda *_: engine)
    server = await serve(labels=("stable",), state_folder=tmp_path / "state")
    gone = True
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: sample(server, "pinrank_model_swaps_total", outcome="failed_surroundings") > 0, 30)
    assert sample(server, "pinrank_model_swaps_total", outcome="failed_bundle") == 0
    assert not (tmp_path / "state").exists()
    assert await calls(server).version() == 1
    gone = False
    await eventually(lambda: held(server, 2) == "serving", 30)


async def test_a_device_without_memory_left_in_a_warm_up_on_recent_requests_is_not_the_bundles_fault(
    serve, calls, store, tmp_path, monkeypatch
):
    full = False

    class Scarce(NumpyEngine):
        def warm_up(self, sample, progress):
            if full:
                raise UnavailableError("CUDA: CUDA_ERROR_OUT_OF_MEMORY")
            return super().warm_up(sample, progress)

    monkeypatch.setattr("server.app.engine_factory", lambda *_: Scarce)
    server = await serve(labels=("stable",), state_folder=tmp_path / "state")
    await calls(server).rank()
    full = True
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: sample(server, "pinrank_model_swaps_total", outcome="failed_surroundings") > 0, 30)
    assert not (tmp_path / "state").exists()
    full = False
    await eventually(lambda: held(server, 2) == "serving", 30)


@pytest.mark.parametrize(
    ("processes", "device", "shares"),
    [
        (2, None, [None, None]),
        (2, 3, [(3,), (3,)]),
        (2, [0, 1], [(0,), (1,)]),
        (2, [0, 1, 5], [(0, 5), (1,)]),
        (3, [0, 1], [(0, 1), (0, 1), (0, 1)]),
    ],
)
def test_processes_have_gpus_of_their_own_where_there_are_enough_and_share_all_of_them_where_not(
    processes, device, shares
):
    config = ServerConfig(
        model_store="m", model="tiny", feature_store=SecretStr("memory://"), engine="torch", device=device,
        processes=processes, http_port=9000,
    )  # fmt: skip
    found = [settings_of(config, number, 6000, 9000) for number in range(processes)]
    assert [one.device for one in found] == shares
    assert [one.engine_streams for one in found] == [3] * processes  # on each GPU
    assert [one.http_port for one in found] == [9000] * processes
    # Each process reads its settings anew, and is not refused by them.
    assert [ServerConfig(**one.model_dump()).devices for one in found] == [share or (0,) for share in shares]


def test_processes_of_an_engine_without_a_gpu_read_their_settings_without_one():
    config = ServerConfig(model_store="m", model="tiny", feature_store=SecretStr("memory://"), processes=2)
    assert ServerConfig(**settings_of(config, 1, 6000, 9000).model_dump()).device is None
