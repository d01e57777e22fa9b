"""The driver's own class, on a driver that keeps CUDA's rules."""

from __future__ import annotations

import sys
import threading

import pytest

from kernels.engine import EngineError, UnavailableError
from kernels.gpu.cuda import CudaStream, Device
from tests.kernels.gpu.fake_cuda import FakeCuda, install


@pytest.fixture
def cuda(monkeypatch):
    made = FakeCuda(devices=2)
    install(monkeypatch, made)
    yield made
    assert made.left() == []


@pytest.fixture
def stream(cuda):
    device = Device()
    yield CudaStream(device)
    device.close()


def copied(cuda, stream):
    cuda.bytes_at(stream.made, 32)[:] = cuda.bytes_at(stream.given, 32)


def test_a_stream_copies_in_order_and_not_before_somebody_waits(cuda, stream):
    with stream.entered():
        host, back = stream.room(64, 32)
        assert not host.any()
        assert not back.any()
        host[:] = 5
        stream.to_device(64)
        cuda.put(stream.handle, "compute", lambda: copied(cuda, stream))
        stream.to_host(16)
        assert not back.any()
        stream.wait()
    assert back.tolist() == [5] * 16 + [0] * 16
    assert [what for what, _ in cuda.log] == ["to device", "compute", "to host"]


def test_no_stream_waits_for_the_legacy_one(cuda, stream):
    assert [held.flags for held in cuda.streams.values()] == [cuda.CUstream_flags.CU_STREAM_NON_BLOCKING]


def test_a_graph_does_again_what_was_put_in(cuda, stream):
    with stream.entered():
        host, _ = stream.room(64, 32)
        launch = stream.captured(lambda: stream.to_device(64))
        for value in (1, 2):
            host[:] = value
            launch()
            stream.wait()
            assert (cuda.bytes_at(stream.given, 64) == value).all()


def test_a_capture_during_which_a_thread_waits_for_the_whole_device_fails_and_the_stream_goes_on(cuda, stream):
    def waits():
        with stream.entered():
            cuda.cuCtxSynchronize()

    def work():
        stream.to_device(64)
        if cuda.log:  # the second time, when it is captured
            other = threading.Thread(target=waits)
            other.start()
            other.join()

    with stream.entered():
        host, _ = stream.room(64, 32)
        with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
            stream.captured(work)
        host[:] = 9
        stream.to_device(64)
        stream.wait()
        assert (cuda.bytes_at(stream.given, 64) == 9).all()


def test_work_that_fails_while_it_is_captured_says_so_and_the_stream_goes_on(cuda, stream):
    def work():
        stream.to_device(64)
        if cuda.log:
            raise EngineError("the plan takes no such shape")

    with stream.entered():
        stream.room(64, 32)
        with pytest.raises(EngineError, match="takes no such shape"):
            stream.captured(work)
        stream.captured(lambda: stream.to_device(64))()
        stream.wait()


@pytest.mark.parametrize("ordinal", [0, 1])
def test_a_device_is_let_go_once_by_whichever_thread_closes_it(cuda, ordinal):
    device = Device(ordinal)
    CudaStream(device)
    assert cuda.retained[ordinal] == 1
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join()
    assert cuda.left() == []
    device.close()
    assert cuda.retained[ordinal] == 0


def test_closing_leaves_what_a_thread_had_entered_before(cuda):
    outer, inner = Device(0), Device(1)
    with outer.entered():
        inner.close()
        assert [held for held in cuda.pushed.values() if held] == [[1000]]
    outer.close()


def test_a_call_without_the_context_is_an_error(cuda, stream):
    with stream.entered():
        stream.room(64, 32)
    with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_CONTEXT"):
        stream.to_device(64)


def test_a_device_that_is_not_there_is_named_and_leaves_nothing(cuda):
    with pytest.raises(
        UnavailableError, match="no CUDA device 7: CUDA: CUDA_ERROR_INVALID_DEVICE; use engine = 'openvino'"
    ):
        Device(7)


def test_without_cuda_bindings_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(UnavailableError, match=r"pip install 'pinrank\[gpu\]'"):
        Device()
