from __future__ import annotations

import itertools
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from subprocess import CalledProcessError
from types import SimpleNamespace
from weakref import WeakValueDictionary

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from triton.runtime.errors import OutOfResources

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import EngineError, ShapeError, UnavailableError
from kernels.fusion import inlined, parse
from kernels.gpu import torch_backend
from kernels.gpu.engine import GpuEngine
from kernels.gpu.torch_backend import TorchBackend, TorchStream, open_torch
from ranker.export.bundle import export_onnx
from tests import tiny
from tests.kernels.test_engines import SPECS
from tests.ranker.exported import FORMS, batch, exported, network, read_by


def plain(network, inputs, heads, ordinal, plan):
    return TorchBackend(inlined(parse(network)), heads, torch.device("cpu"))


@pytest.mark.parametrize(("fusion", "form"), FORMS)
def test_every_exported_ranker_runs_and_agrees_with_the_reference(fusion, form):
    content, specs = exported(fusion, form)
    taken, _ = read_by(fusion, batch())
    engine = GpuEngine(plain, content, specs, 3)
    np.testing.assert_allclose(engine.run(taken), NumpyEngine(content, specs, 3).run(taken), atol=1e-4)
    assert (engine.kernel, engine.tolerance) == ("none", 0)


def test_a_ranker_that_crosses_a_part_of_its_vectors_agrees_with_the_reference():
    taken, specs = read_by("late", batch())
    content = export_onnx(network("late", crossed_dim=8), taken)
    engine = GpuEngine(plain, content, specs, 3)
    np.testing.assert_allclose(engine.run(taken), NumpyEngine(content, specs, 3).run(taken), atol=1e-4)


def test_the_encoder_runs_in_the_fused_kernel():
    content, specs = exported()
    taken, _ = read_by("early", batch())
    engine = GpuEngine(open_torch, content, specs, 3)
    expected = NumpyEngine(content, specs, 3).run(taken)
    found = engine.run(taken)
    assert engine.kernel == "triton"
    assert 0 < np.abs(found - expected).max() <= engine.tolerance * max(1.0, np.abs(expected).max())


def test_streams_do_not_mix_their_rows():
    content, specs = exported()
    engine = GpuEngine(open_torch, content, specs, 3, streams=3)
    parts = [read_by("early", batch(rows=rows))[0] for rows in (3, 5, 4)]
    expected = [engine.run(part) for part in parts]
    with ThreadPoolExecutor(3) as threads:
        for found, wanted in zip(threads.map(engine.run, parts * 2), expected * 2, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_codes_that_no_action_has_never_reach_the_device():
    content, specs = exported()
    taken, _ = read_by("early", batch())
    taken.request["sequence_actions"][0, 0] = 99
    with pytest.raises(ShapeError, match="actions must be codes from 0 to 4, got 0 to 99"):
        GpuEngine(open_torch, content, specs, 3).run(taken)


def test_an_operator_that_is_not_known_is_named():
    model = onnx.load_model_from_string(tiny.network())
    model.graph.node.append(helper.make_node("Erf", ["query"], ["unused"]))
    with pytest.raises(EngineError, match="does not support operator onnx.Erf"):
        GpuEngine(open_torch, model.SerializeToString(), SPECS, 2)


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(UnavailableError, match="PyTorch cannot use cuda:7"):
        GpuEngine(open_torch, tiny.network(), SPECS, 2, devices=(7,))


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(489, 227, "shared memory"),
        PermissionError(13, "Permission denied", "/.triton"),
        CalledProcessError(1, "gcc"),
    ],
)
def test_what_triton_raises_at_a_first_run_is_an_engine_error(error):
    """None of it a RuntimeError: a program that does not fit, a cache that is read-only, a compiler that fails."""
    with (
        pytest.raises(EngineError, match=re.escape(f"PyTorch: {type(error).__name__}: {error}")),
        TorchStream(torch.device("cpu")).entered(),
    ):
        raise error


@pytest.fixture
def asked(monkeypatch):
    """What PyTorch would be asked of a GPU, in order."""
    noted = []

    def note(name, made=None):
        return lambda *_, **given: noted.append(" ".join([name, *map(str, given.values())])) or made

    graph = SimpleNamespace(capture_begin=note("begin"), capture_end=note("end"), replay=note("replay"))
    event = SimpleNamespace(record=note("record"), synchronize=note("wait"))
    streams = itertools.count()

    def stream(_):
        return SimpleNamespace(cuda_stream=next(streams) % 32)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch_backend, "_STREAMS", WeakValueDictionary())
    stands = {"Event": event, "CUDAGraph": graph, "graph_pool_handle": 7, "stream": nullcontext()}
    for name, made in stands.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, made=made, **__: made)
    monkeypatch.setattr(torch.cuda, "synchronize", note("the whole device"))
    return noted


@pytest.mark.usefixtures("asked")
def test_no_two_slots_share_one_of_the_streams_that_pytorch_gives_out_in_turn():
    device = torch.device("cuda", 0)
    streams = [TorchStream(device) for _ in range(3)]
    for _ in range(40):  # versions that come and go
        TorchStream(device)
    streams += [TorchStream(device) for _ in range(29)]
    assert len({stream.number for stream in streams}) == 32
    with pytest.raises(UnavailableError, match="engines use all 32 streams of cuda:0; lower engine_streams"):
        TorchStream(device)
    del streams[5]
    TorchStream(device)


def test_an_engine_that_is_closed_lets_its_slots_go(monkeypatch):
    """At once, so that the next version has their streams."""
    made, make = [], TorchBackend.stream

    def stream(backend):
        found = make(backend)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(TorchBackend, "stream", stream)
    content, specs = exported()
    engine = GpuEngine(plain, content, specs, 3, streams=2)
    for _ in range(4):
        engine.run(read_by("early", batch())[0])
    assert [one() is None for one in made] == [False, False]
    engine.close()
    assert [one() is None for one in made] == [True, True]


def test_a_capture_runs_once_first_and_waits_for_its_own_stream_alone(asked):
    stream = TorchStream(torch.device("cuda", 0))
    with stream.entered():
        launch = stream.captured(lambda: asked.append("work"))
        launch()
    assert asked == ["work", "record", "wait", "begin 7 thread_local", "work", "end", "replay"]


def test_a_capture_ends_when_its_work_fails_and_the_error_is_the_works(asked):
    def end():
        asked.append("end")
        raise RuntimeError("operation failed due to a previous error during capture")

    torch.cuda.CUDAGraph().capture_end = end
    stream = TorchStream(torch.device("cuda", 0))

    def work():
        asked.append("work")
        if asked.count("work") == 2:
            raise RuntimeError("an illegal address")

    with pytest.raises(EngineError, match="an illegal address"), stream.entered():
        stream.captured(work)
    assert asked[-2:] == ["work", "end"]


@pytest.mark.parametrize(
    ("raised", "expected"), [(torch.OutOfMemoryError("2 GiB"), UnavailableError), (RuntimeError("2 GiB"), EngineError)]
)
def test_no_memory_left_is_not_the_networks_fault(raised, expected):
    with pytest.raises(EngineError, match="2 GiB") as found, TorchStream(torch.device("cpu")).entered():
        raise raised
    assert found.type is expected
