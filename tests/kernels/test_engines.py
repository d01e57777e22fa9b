"""The contract every engine passes; `numpy` is the reference the others are held to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import EngineError, FeatureBatch, ShapeError, WarmedUp
from kernels.engines import ENGINES, engine_factory
from model_store.model.assembly import Assembler
from tests import tiny
from tests.kernels.gpu.fake_cuda import PLAN, FakeCuda, fake_trt, install

SPECS = tiny.manifest().specs


#: Those that run without a GPU; TensorRT's is on a device that only keeps the driver's rules.
HERE = ("numpy", "openvino", "torch", "tensorrt on a fake device")


@pytest.fixture(params=HERE)
def engine(request, monkeypatch):
    name, plan = request.param.partition(" ")[0], None
    if name == "tensorrt":
        cuda, plan = FakeCuda(), PLAN + tiny.network()
        install(monkeypatch, cuda, fake_trt(cuda, SPECS, heads=2))
    opened = engine_factory(name)(tiny.network(), SPECS, heads=2, streams=2, plan=plan)
    yield opened
    opened.close()


def batch(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    sides = {"request": len(sizes), "candidate": sum(sizes)}
    tensors = {"request": {}, "candidate": {}}
    for spec in SPECS:
        shape = (sides[spec.side], *spec.shape)
        value = rng.integers(0, 2, shape) if spec.dtype == "int64" else rng.normal(size=shape)
        tensors[spec.side][spec.name] = value.astype(spec.dtype)
    return FeatureBatch(
        tensors["request"], tensors["candidate"], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    )


@pytest.mark.parametrize("sizes", [(1,), (128,), (3, 1, 40), (0, 5), (2, 0, 2), (700,)])
def test_every_engine_agrees_with_the_reference(engine, sizes):
    reference = NumpyEngine(tiny.network(), SPECS, heads=2)
    logits = engine.run(batch(*sizes))
    assert logits.dtype == np.float32
    assert logits.shape == (sum(sizes), 2)
    np.testing.assert_allclose(logits, reference.run(batch(*sizes)), atol=1e-4)


def test_a_batch_scores_as_its_requests_do_one_by_one(engine):
    parts = [batch(n, seed=n) for n in (5, 1, 17)]
    joined = engine.run(FeatureBatch.concat(parts))
    np.testing.assert_allclose(joined, np.concatenate([engine.run(part) for part in parts]), atol=1e-5)


def test_runs_of_one_request_and_of_several_may_follow_each_other(engine):
    reference = NumpyEngine(tiny.network(), SPECS, heads=2)
    for seed, sizes in enumerate(((4,), (4,), (2, 3), (5,), (5,), (1, 1, 1), (4,), (2, 3), (2, 3))):
        asked = batch(*sizes, seed=seed)
        np.testing.assert_allclose(engine.run(asked), reference.run(asked), atol=1e-4)


def test_streams_run_at_once_and_do_not_mix_their_answers(engine):
    parts = [batch(n, seed=n) for n in range(1, 41)]
    expected = [engine.run(part) for part in parts]
    found = [None] * len(parts)

    def work(mine):
        for i in mine:
            found[i] = engine.run(parts[i])

    threads = [threading.Thread(target=work, args=(range(start, len(parts), 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_results_stay_as_they_were_after_later_runs(engine):
    first = engine.run(batch(4))
    kept = first.copy()
    for seed in range(4):
        engine.run(batch(4, seed=seed + 1))
    np.testing.assert_array_equal(first, kept)


def test_cost_is_unknown_before_warm_up_and_grows_with_rows_after(engine):
    assert engine.cost_s(128) == 0
    engine.warm_up(batch(8))
    assert engine.cost_s(100_000) >= engine.cost_s(1) >= 0
    assert engine.cost_s(100_000) > 0


def test_a_warm_up_tells_before_its_first_run_and_after_each_how_far_it_is(engine):
    told = []

    def progress(runs, of):
        told.append((runs, of))
        return True

    done = engine.warm_up(batch(8), progress)
    assert done == WarmedUp(done.of, done.of)
    assert told == [(runs, done.of) for runs in range(done.of + 1)]


def test_a_warm_up_without_time_leaves_out_shapes_and_knows_the_cost_all_the_same(engine, request):
    whole = engine.warm_up(batch(8)).of
    done = engine.warm_up(batch(8), lambda runs, of: False)
    has_shapes = "tensorrt" in request.node.name
    assert done.of == whole
    assert (done.runs < whole) == has_shapes
    assert engine.cost_s(100_000) > 0


def test_what_is_raised_between_runs_ends_a_warm_up_and_leaves_the_engine_good(engine):
    def progress(runs, of):
        if runs == 3:
            raise KeyError("enough")
        return True

    with pytest.raises(KeyError, match="enough"):
        engine.warm_up(batch(8), progress)
    assert engine.run(batch(8)).shape == (8, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b.candidate.pop("pin_topic"), "lacks the candidate tensor 'pin_topic'"),
        (lambda b: b.request.update(query=b.request["query"].astype(np.float64)), "'query': expected float32"),
        (lambda b: b.request.update(query=b.request["query"][:, :2]), r"'query': expected float32\[2, 4\], got"),
        (lambda b: b.candidate.update(pin_topic=b.candidate["pin_topic"][1:]), "'pin_topic'"),
    ],
)
def test_wrong_batch_is_named(engine, damage, message):
    wrong = batch(2, 3)
    damage(wrong)
    with pytest.raises(ShapeError, match=message):
        engine.run(wrong)


@pytest.mark.parametrize("network", [b"", b"not onnx", tiny.network()[:200]])
@pytest.mark.parametrize("name", ENGINES)
def test_damaged_network_is_an_engine_error(name, network):
    with pytest.raises(EngineError):
        engine_factory(name)(network, SPECS, heads=2, streams=1)


def test_openvino_names_inputs_that_the_manifest_does_not_declare():
    with pytest.raises(EngineError, match="the manifest declares"):
        engine_factory("openvino")(tiny.network(), SPECS[1:], heads=2, streams=1)


def test_openvino_refuses_a_network_without_logits():
    with pytest.raises(EngineError, match="no output 'logits'"):
        engine_factory("openvino")(tiny.network().replace(b"logits", b"digits"), SPECS, heads=2, streams=1)


def test_openvino_tells_nobody_that_it_is_used(tmp_path):
    story = """
import threading
from kernels.engines import engine_factory
engine_factory("openvino")
print(threading.active_count())
"""
    # Nothing else of the environment: where CI is set it would tell nobody anyway.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", story], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert not list(tmp_path.iterdir())  # it keeps an identity of the user's there


#: The packages that compute, and the engines that import theirs when they are chosen: an engine imports no other's.
RUNTIMES = {"openvino", "torch", "tensorrt", "tensorrt_rtx", "cuda", "onnxruntime"}
IMPORTED = {"openvino": ["openvino"], "torch": ["torch"]}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_imported_without_the_runtimes_of_others_without_threads_and_without_a_device(name):
    if name == "torch":
        pytest.importorskip("torch")
    # What asks for a device, before anything of ours is imported: a process that forks afterwards could not use it.
    story = f"""
import sys, threading
if {name!r} == "torch":
    import torch
    def touched(*_):
        raise SystemExit("it asks for a device")
    torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
from kernels.engines import engine_factory
engine_factory({name!r})
print(*sorted({RUNTIMES!r} & set(sys.modules)), threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", story], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == ([*IMPORTED.get(name, []), "1"], "")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "engine 'openvino' lacks x; pip install x"),
        (
            ImportError("libx.so: no such file"),
            "engine 'openvino' cannot be imported: ImportError: libx.so: no such file",
        ),
        (OSError("libx.so: no such file"), "engine 'openvino' cannot be imported: OSError: libx.so: no such file"),
        (RuntimeError("built for another ABI"), "cannot be imported: RuntimeError: built for another ABI"),
        (AttributeError("no bool8"), "cannot be imported: AttributeError: no bool8"),
    ],
)
def test_an_engine_that_cannot_be_imported_says_why(monkeypatch, failure, message):
    class Failing:
        @staticmethod
        def find_spec(name, *_):
            if name == "kernels.cpu.openvino_engine":
                raise failure

    monkeypatch.delitem(sys.modules, "kernels.cpu.openvino_engine", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Failing, *sys.meta_path])
    with pytest.raises(ValueError, match=message):
        engine_factory("openvino")


def test_unknown_engine_names_those_there_are():
    with pytest.raises(ValueError, match=f"unknown engine 'abacus'; choose one of {', '.join(ENGINES)}$"):
        engine_factory("abacus")


def test_rows_know_their_request():
    assert batch(2, 0, 3).row_request().tolist() == [0, 0, 2, 2, 2]


def test_assembled_batches_fit_the_engine(engine):
    assembled = Assembler(tiny.manifest()).assemble(tiny.fetched([1, 2, 3], [4]), "home")
    assert engine.run(assembled).shape == (3, 2)
