"""The GPU engine's copies, graphs and clean-up, on a device that keeps the driver's rules without being there."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.engine import EngineError, UnavailableError
from kernels.gpu import tensorrt_engine
from kernels.gpu.cuda import PyCudaDriver
from kernels.gpu.tensorrt_build import Built
from kernels.gpu.tensorrt_engine import TensorRtEngine
from kernels.numpy_engine import NumpyEngine
from tests import tiny
from tests.kernels.gpu.fake_cuda import PLAN, FakeDriver, fake_trt
from tests.kernels.test_engines import SPECS, batch


@pytest.fixture
def driver():
    made = FakeDriver()
    yield made
    assert not made.memory, "device memory was not given back"
    assert not made.graphs


GOOD = PLAN + tiny.network()


def opened(driver, network=None, *, plan=GOOD, inputs=SPECS, streams=1):
    return TensorRtEngine(
        network or tiny.network(), inputs, 2, streams, plan=plan, driver=driver, trt=fake_trt(driver, SPECS, 2)
    )


def test_a_run_is_one_copy_in_the_network_and_one_copy_out(driver):
    engine = opened(driver)
    engine.run(batch(3, 4))
    driver.log.clear()
    engine.run(batch(5, 1))
    assert [what for what, _ in driver.log] == ["to device", "compute", "to host"]
    engine.close()


def test_a_graph_is_captured_once_for_each_bucket_and_stream(driver):
    engine = opened(driver, streams=2)
    for rows in (1, 64, 65, 128, 30, 100):
        for _ in range(4):  # the lanes take turns
            engine.run(batch(rows))
    captured = [stream for what, stream in driver.log if what == "captured"]
    # A larger bucket needs larger buffers, and graphs know addresses: the small bucket is captured again.
    assert len(captured) <= 6
    assert len(set(captured)) == 2
    driver.log.clear()
    engine.run(batch(70))
    assert "captured" not in [what for what, _ in driver.log]
    engine.close()


def test_after_a_warm_up_no_shape_is_a_first_one(driver):
    engine = opened(driver, streams=2)
    engine.warm_up(batch(5))
    driver.log.clear()
    for sizes in ((1,), (64,), (300,), (4096,), (9000,), (1,) * 64, (100,) * 40):
        for _ in range(2):
            engine.run(batch(*sizes))
    assert {what for what, _ in driver.log} == {"to device", "compute", "to host"}
    engine.close()


def test_batches_larger_than_any_bucket_are_cut(driver):
    engine = opened(driver)
    reference = NumpyEngine(tiny.network(), SPECS, 2)
    for sizes in ((9000,), (1,) * 130, (4095, 2, 0, 4097)):
        large = batch(*sizes)
        np.testing.assert_allclose(engine.run(large), reference.run(large), atol=1e-5)
    engine.close()


def test_what_padding_holds_changes_no_answer(driver):
    """A full bucket runs before a nearly empty one."""
    engine = opened(driver)
    noise = batch(64)
    for name in noise.candidate:
        noise.candidate[name] = np.full_like(noise.candidate[name], 1)
    expected = engine.run(batch(3))
    engine.run(noise)
    np.testing.assert_array_equal(engine.run(batch(3)), expected)
    engine.close()


def test_a_plan_for_another_gpu_is_built_anew_and_the_log_says_so(driver, monkeypatch, caplog):
    asked = []

    def build(network, inputs, settings):
        asked.append((tuple(inputs), settings.library))
        return Built(PLAN + network, b"")

    monkeypatch.setattr(tensorrt_engine, "build", build)
    engine = opened(driver, plan=b"of another")
    assert asked == [(SPECS, "tensorrt")]
    assert "plans/tensorrt_10_13_0-sm_90-bfloat16.plan: it is built anew" in caplog.text
    assert engine.plan() == PLAN + tiny.network()
    assert engine.run(batch(2)).shape == (2, 2)
    engine.close()


def test_a_plan_of_another_network_is_refused_and_leaves_nothing(driver):
    with pytest.raises(EngineError, match="the plan's 'pin_topic' is .* the manifest's not there"):
        opened(driver, inputs=tuple(spec for spec in SPECS if spec.name != "pin_topic"))
    assert driver.closed


def test_a_build_that_fails_leaves_nothing(driver, monkeypatch):
    def build(*_):
        raise EngineError("tensorrt could not build the network (signal 11)")

    monkeypatch.setattr(tensorrt_engine, "build", build)
    with pytest.raises(EngineError, match="signal 11"):
        opened(driver, plan=None)
    assert driver.closed


def test_a_failed_run_names_what_failed_and_the_next_one_works(driver):
    engine = opened(driver)
    expected = engine.run(batch(3))
    lane = engine._lanes[0]
    good, lane._driver = lane._driver, None
    with pytest.raises(AttributeError):
        engine.run(batch(3))
    lane._driver = good
    np.testing.assert_array_equal(engine.run(batch(3)), expected)
    engine.close()


def test_without_a_gpu_the_error_says_what_to_use():
    with pytest.raises(UnavailableError, match=r"pip install 'pinrank\[gpu\]'|use engine = 'openvino'"):
        PyCudaDriver()
