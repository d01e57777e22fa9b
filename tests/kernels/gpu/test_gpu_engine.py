"""The GPU engine's copies, graphs and clean-up, with TensorRT's backend on a driver that keeps CUDA's rules."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import EngineError, UnavailableError
from kernels.engines import bundled_plan, engine_factory
from kernels.gpu import engine as engine_module
from kernels.gpu import tensorrt_backend
from kernels.gpu.engine import GpuEngine
from kernels.gpu.tensorrt_backend import TensorRtBackend, plan_here
from kernels.gpu.tensorrt_build import BuildResult
from tests import tiny
from tests.kernels.gpu.fake_cuda import PLAN, FakeCuda, fake_trt, install
from tests.kernels.test_engines import SPECS, batch


@pytest.fixture
def cuda(monkeypatch):
    made = FakeCuda(devices=2)
    install(monkeypatch, made, fake_trt(made, SPECS, 2))
    yield made
    assert made.left() == []


GOOD = PLAN + tiny.network()


def opened(*, plan=GOOD, inputs=SPECS, streams=1, devices=(0,)):
    return GpuEngine(
        partial(TensorRtBackend, "tensorrt"), tiny.network(), inputs, 2, streams, plan=plan, devices=devices
    )


def done(cuda):
    return [what for what, _ in cuda.log]


def test_a_run_is_one_copy_in_the_network_and_one_copy_out(cuda):
    engine = opened()
    engine.run(batch(3, 4))
    cuda.log.clear()
    engine.run(batch(5, 1))
    assert done(cuda) == ["to device", "compute", "to host"]
    engine.close()


def test_a_graph_is_captured_once_for_each_bucket_and_slot(cuda):
    engine = opened(streams=2)
    for rows in (1, 64, 65, 128, 4096, 30, 100):
        for _ in range(4):  # the slots take turns
            engine.run(batch(rows))
    assert done(cuda).count("captured") == 2 * 3
    assert len({stream for what, stream in cuda.log if what == "compute"}) == 2
    engine.close()


def test_a_slot_has_room_for_every_bucket_from_the_start(cuda):
    engine = opened()
    memory, pinned = set(cuda.memory), set(cuda.pinned)
    for sizes in ((1,), (4096,), (64,) * 64):
        engine.run(batch(*sizes))
    assert (set(cuda.memory), set(cuda.pinned)) == (memory, pinned)
    engine.close()


def test_after_a_warm_up_no_shape_is_a_first_one(cuda):
    engine = opened(streams=2)
    engine.warm_up(batch(5))
    cuda.log.clear()
    for sizes in ((1,), (64,), (300,), (4096,), (9000,), (1,) * 64, (100,) * 40):
        for _ in range(2):
            engine.run(batch(*sizes))
    assert set(done(cuda)) == {"to device", "compute", "to host"}
    engine.close()


def test_a_warm_up_begins_with_one_request_and_few_rows(cuda, monkeypatch):
    engine, ran = opened(), []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda given: ran.append((given.requests, given.rows)) or run(given))
    engine.warm_up(batch(5))
    shapes = list(dict.fromkeys(ran))
    assert shapes[:8] == [(1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048), (1, 4096), (4, 64)]
    assert done(cuda).count("captured") == 28
    engine.close()


def test_batches_larger_than_any_bucket_are_cut(cuda):
    engine = opened()
    reference = NumpyEngine(tiny.network(), SPECS, 2)
    for sizes in ((9000,), (1,) * 130, (4095, 2, 0, 4097)):
        large = batch(*sizes)
        np.testing.assert_allclose(engine.run(large), reference.run(large), atol=1e-5)
    engine.close()


def test_what_padding_holds_changes_no_answer(cuda):
    """A full bucket runs before a nearly empty one."""
    engine = opened()
    noise = batch(64)
    for name in noise.candidate:
        noise.candidate[name] = np.full_like(noise.candidate[name], 1)
    expected = engine.run(batch(3))
    engine.run(noise)
    np.testing.assert_array_equal(engine.run(batch(3)), expected)
    engine.close()


def test_every_device_has_slots_of_its_own_that_take_turns(cuda):
    engine = opened(streams=2, devices=(0, 1))
    assert engine.streams == 4
    reference = NumpyEngine(tiny.network(), SPECS, 2)
    for seed in range(8):
        given = batch(5, 3, seed=seed)
        np.testing.assert_allclose(engine.run(given), reference.run(given), atol=1e-5)
    used = {stream for what, stream in cuda.log if what == "compute"}
    assert sorted(cuda.streams[stream].context for stream in used) == [1000, 1000, 1001, 1001]
    engine.close()


def test_a_plan_built_for_the_first_device_serves_the_second(cuda, monkeypatch):
    builds = []
    monkeypatch.setattr(
        tensorrt_backend, "build", lambda network, *_: builds.append(network) or BuildResult(PLAN + network, b"")
    )
    engine = engine_factory("tensorrt", devices=(0, 1))(tiny.network(), SPECS, 2, 1)
    assert builds == [tiny.network()]
    engine.close()


@pytest.mark.parametrize("devices", [(), (0, 0), (-1,)])
def test_devices_that_cannot_be_are_refused(devices):
    with pytest.raises(ValueError, match="devices must be ordinals of GPUs, each once"):
        engine_factory("tensorrt", devices)


def test_a_cpu_engine_takes_no_devices():
    with pytest.raises(ValueError, match=r"'numpy' runs on the CPU and takes no devices, got \[1\]"):
        engine_factory("numpy", [1])


def test_a_second_device_that_is_not_there_leaves_nothing_of_the_first(cuda):
    with pytest.raises(EngineError, match="no CUDA device 5"):
        opened(devices=(0, 5))
    assert cuda.left() == []


def test_memory_that_does_not_suffice_leaves_nothing(cuda, monkeypatch):
    allocate, asked = cuda.cuMemAlloc, []

    def scarce(size):
        asked.append(size)
        return allocate(size) if len(asked) < 4 else (2, None)

    monkeypatch.setattr(cuda, "cuMemAlloc", lambda size: _status(cuda, scarce(size)))
    with pytest.raises(UnavailableError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        opened(streams=3)
    assert cuda.left() == []


def _status(cuda, answer):
    status, *rest = answer
    return type(cuda.cuInit(0)[0])(status), *rest


def test_a_plan_for_another_gpu_is_built_anew_and_the_log_says_so(cuda, monkeypatch, caplog):
    asked = []

    def build(network, inputs, settings):
        asked.append((tuple(inputs), settings.library, settings.architectures))
        return BuildResult(PLAN + network, b"")

    monkeypatch.setattr(tensorrt_backend, "build", build)
    engine = opened(plan=b"of another")
    assert asked == [(SPECS, "tensorrt", ("9.0",))]
    assert "plans/tensorrt_10_13_0-sm_90-bfloat16.plan; building a new one" in caplog.text
    assert engine.plan() == GOOD
    assert engine.run(batch(2)).shape == (2, 2)
    engine.close()


def test_a_plan_of_another_network_is_refused_and_leaves_nothing(cuda):
    with pytest.raises(EngineError, match="tensor 'pin_topic' is .* in the plan, but missing in the manifest"):
        opened(inputs=tuple(spec for spec in SPECS if spec.name != "pin_topic"))
    assert cuda.left() == []


def test_a_build_that_fails_leaves_nothing(cuda, monkeypatch):
    def build(*_):
        raise EngineError("tensorrt could not build the network (signal 11)")

    monkeypatch.setattr(tensorrt_backend, "build", build)
    with pytest.raises(EngineError, match="signal 11"):
        opened(plan=None)
    assert cuda.left() == []


def test_a_failed_run_names_what_failed_and_the_next_one_works(cuda, monkeypatch):
    engine = opened()
    expected = engine.run(batch(3))
    with monkeypatch.context() as failing:
        failing.setattr(cuda, "cuGraphLaunch", lambda *_: _status(cuda, (700, None)))
        with pytest.raises(EngineError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            engine.run(batch(3))
    np.testing.assert_array_equal(engine.run(batch(3)), expected)
    engine.close()


class Watched:
    """A lock that tells when somebody must wait for it."""

    def __init__(self, contended):
        self._lock, self._contended = threading.Lock(), contended

    def __enter__(self):
        if not self._lock.acquire(blocking=False):
            self._contended()
            self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()


def test_an_engine_that_opens_and_closes_breaks_no_capture_of_another(cuda, monkeypatch):
    """A hot swap: the old version serves, and captures, while the new one is opened, warmed up and closed again."""
    reached = threading.Event()
    watched = Watched(reached.set)
    for module in (engine_module, tensorrt_backend):
        monkeypatch.setattr(module, "WHOLE_DEVICE", watched)
    serving, failed = opened(), []

    def swap():
        try:
            new = opened()
            new.run(batch(3))
            new.close()
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=swap)
    begin = cuda.cuStreamBeginCapture

    def begun(*given):
        answer = begin(*given)
        if not other.ident:
            # Another thread must not get as far as waiting for the whole device before this capture ends.
            cuda.on_wait = reached.set
            other.start()
            assert reached.wait(30)
        return answer

    monkeypatch.setattr(cuda, "cuStreamBeginCapture", begun)
    expected = NumpyEngine(tiny.network(), SPECS, 2).run(batch(3))
    np.testing.assert_allclose(serving.run(batch(3)), expected, atol=1e-5)
    other.join()
    assert failed == []
    serving.close()


def test_a_plan_is_named_for_the_first_of_the_devices(cuda):
    assert bundled_plan("tensorrt", (1, 0)) == plan_here("tensorrt", 1) == "plans/tensorrt_10_13_0-sm_90-bfloat16.plan"
    assert bundled_plan("torch") is None
