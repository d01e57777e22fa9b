"""What a hostile network can do to the process that proves it, and what the server hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from kernels.engine import FeatureBatch
from model_store.bundle.files import BundleError, read_bundle
from model_store.model.assembly import Assembler
from server.proving.helper import cpu_s
from server.proving.prover import ProofLimits, Prover, ProvingError
from tests import tiny
from tests.conftest import needs_training
from tests.processes import children, ends_of


@pytest.fixture(scope="module")
def prover():
    with closing(Prover("openvino", nice=0)) as shared:
        yield shared


def hungry():
    """Takes 1.6 GB for a run of any size: less than the limit of a run, and more than the proof may."""
    model = onnx.load_model_from_string(tiny.network(seed=1))
    model.graph.initializer.append(numpy_helper.from_array(np.array([20_000, 20_000], np.int64), "many"))
    make = helper.make_node
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(
        [
            make("ReduceSum", ["query"], ["one"], keepdims=0),
            make("Expand", ["one", "many"], ["giant"]),
            make("Sin", ["giant"], ["sums"]),
            make("ReduceSum", ["sums"], ["zero"], keepdims=0),
            make("Add", ["before", "zero"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def slow():
    """Computes 20,000 sines for each candidate: nothing for the golden ones, and much for 5,000."""
    model = onnx.load_model_from_string(tiny.network(seed=1))
    wide = np.linspace(0, 1, 4_000, dtype=np.float32)[None]
    model.graph.initializer.extend(
        [numpy_helper.from_array(wide, "wide"), numpy_helper.from_array(np.array(1e-12, np.float32), "hardly")]
    )
    make = helper.make_node
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(make("MatMul", ["pin_scalars", "wide"], ["s0"]))
    for i in range(5):
        model.graph.node.append(make("Sin", [f"s{i}"], [f"s{i + 1}"]))
    model.graph.node.extend(
        [
            make("ReduceSum", ["s5", "axis1"], ["sum"], keepdims=1),
            make("Mul", ["sum", "hardly"], ["less"]),
            make("Add", ["before", "less"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def reordered():
    """Is small in the order of its file. OpenVINO computes all the wide tensors before it reduces the first."""
    model = onnx.load_model_from_string(tiny.network(seed=1))
    make = helper.make_node
    model.graph.node[-1].output[0] = "before"
    reduced = [f"{which}{i}" for which in ("most", "least") for i in range(20)]
    for i in range(20):
        wide = np.linspace(i, i + 1, 2_500, dtype=np.float32)[None]
        model.graph.initializer.append(numpy_helper.from_array(wide, f"wide{i}"))
        model.graph.node.extend(
            [
                make("Add", ["pin_scalars", f"wide{i}"], [f"sum{i}"]),
                make("ReduceMax", [f"sum{i}", "axis1"], [f"most{i}"], keepdims=1),
                make("ReduceMin", [f"sum{i}", "axis1"], [f"least{i}"], keepdims=1),
            ]
        )
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-12, np.float32), "hardly"))
    model.graph.node.extend(
        [
            make("Sum", reduced, ["all"]),
            make("Mul", ["all", "hardly"], ["less"]),
            make("Add", ["before", "less"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def endless():
    """Computes for minutes."""
    model = onnx.load_model_from_string(tiny.network(seed=1))
    size = numpy_helper.from_array(np.array([3000, 3000], np.int64), "size")
    model.graph.initializer.append(size)
    make = helper.make_node
    model.graph.node[-1].output[0] = "before"
    # From the input, so that no compiler computes it beforehand.
    model.graph.node.extend(
        [make("ReduceSum", ["query"], ["one"], keepdims=0), make("Expand", ["one", "size"], ["m0"])]
    )
    for i in range(400):
        model.graph.node.append(make("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]))
    model.graph.node.extend(
        [make("ReduceSum", ["m400"], ["sum"], keepdims=0), make("Add", ["before", "sum"], ["logits"])]
    )
    return model.SerializeToString()


@pytest.fixture
def claim(tmp_path):
    """Make claims of tiny@1, with networks of their own: a bundle, and the limits of its proof."""

    def make(network=None, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tiny.write_tiny_bundle(folder, 1, **({"network.onnx": network} if network else {}))
        return read_bundle(folder), replace(ProofLimits("openvino", None, 4 << 30, 60.0), **changes)

    return make


@pytest.mark.parametrize("engine", ["openvino", "numpy"])
def test_a_good_bundle_is_proven_and_scores_the_samples(prover, claim, engine):
    samples = [
        Assembler(tiny.manifest()).assemble(tiny.fetched(pins, [4, 5]), "home")
        for pins in ([1, 2, 3], [7], list(range(1, 20)))
    ]
    proof = prover.prove(*claim(engine=engine, share=0.5), FeatureBatch.concat(samples))
    assert proof.logits.shape == (23, 2)
    assert np.isfinite(proof.logits).all()
    assert (proof.plan is not None) == (engine == "openvino")
    assert proof.memory_bytes > 0


def test_what_the_servers_environment_holds_is_not_in_that_of_the_process_that_proves(claim, monkeypatch):
    secrets = {
        "PINRANK_FEATURE_STORE": "redis://:planted@host",
        "AWS_SECRET_ACCESS_KEY": "planted",
        "OVERALL_PASSWORD": "planted",
        "PYTHON_INDEX_TOKEN": "planted",
    }
    for name, value in (*secrets.items(), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    with closing(Prover("numpy", nice=0)) as own:
        own.prove(*claim(engine="numpy"), None)
        environment = Path(f"/proc/{own.helper_pid}/environ").read_bytes()
    assert b"OMP_NUM_THREADS=1" in environment.split(b"\0")
    assert b"planted" not in environment


def test_a_run_of_recent_requests_that_fails_quotes_nothing_of_them(prover, claim):
    batch = Assembler(tiny.manifest()).assemble(tiny.fetched([1, 2, 3], [4, 5]), "home")
    batch.candidate["pin_topic"][1] = 987_654  # beyond the network's eight
    with pytest.raises(BundleError, match="tiny@1: scoring recent requests failed with .*Error") as failed:
        prover.prove(*claim(engine="numpy"), batch)
    assert "987654" not in str(failed.value)


def test_a_bundle_is_proven_also_while_requests_leave_nothing_idle(claim):
    with closing(Prover("openvino")) as own:
        own.pace.busy = True
        assert own.prove(*claim(share=0.5), None).memory_bytes > 0


def test_one_that_requests_left_no_time_for_is_not_the_bundles_fault(claim):
    with closing(Prover("openvino")) as own:
        own.pace.busy = True
        with pytest.raises(
            ProvingError, match="tiny@1: the proof did not finish within 2 s: .* paused for .* s in favour of requests"
        ):
            own.prove(*claim(endless(), timeout_s=2.0, engine="numpy", share=0.05), None)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (hungry, {"memory_bytes_max": 1 << 30, "run_bytes_max": 8 << 30}, "tiny@1"),
        (
            hungry,
            {"run_bytes_max": 1 << 30},
            r"a run of 5,000 rows \(candidates_max\) of one request holds .* the limit is 1,073,741,824",
        ),
        (
            endless,
            {"timeout_s": 3.0, "engine": "numpy"},
            "tiny@1: the proof did not finish within 3 s: it used .* raise swap.proof_timeout_s",
        ),
        (
            slow,
            {"run_s_max": 0.02},
            "tiny@1: a run of 5,000 candidates .* takes .* s of processor time here, the limit is 0.02 s",
        ),
        (
            reordered,
            {"run_bytes_max": 256 << 20},
            r"a run of 5,000 candidates \(candidates_max\) of 1 requests fails with 268,435,456 bytes",
        ),
        (None, {"utility": "surfaces = {}"}, "surfaces"),
    ],
)
def test_what_harms_is_refused_and_the_next_proof_works(prover, claim, network, changes, message):
    good = claim()
    with pytest.raises(BundleError, match=message):
        prover.prove(*claim(network and network(), **changes), None)
    assert prover.prove(*good, None).memory_bytes >= 0


def _while_proving(prover, claim, act):
    """Prove on another thread, act while a child is at it, and return what came of it."""
    outcome = []

    def prove():
        try:
            outcome.append(prover.prove(*claim, None))
        except (BundleError, ProvingError) as error:
            outcome.append(error)

    thread = threading.Thread(target=prove)
    thread.daemon = True
    thread.start()
    while not (found := children(prover.helper_pid) if prover.helper_pid else []):
        assert thread.is_alive()
    act(found[0])
    thread.join(60)
    return outcome[0]


def test_a_crash_of_the_network_is_the_bundles_fault(prover, claim):
    slow = claim(endless(), engine="numpy")
    prover.start()
    found = _while_proving(prover, slow, lambda child: os.kill(child, signal.SIGSEGV))
    assert isinstance(found, BundleError)
    assert "the proving process was killed by SIGSEGV" in str(found)
    assert prover.prove(*claim(), None).memory_bytes >= 0


def test_a_helper_that_dies_is_nobodys_fault_and_is_replaced_by_one_for_the_same_engine(claim):
    with closing(Prover("numpy")) as own:
        slow = claim(endless(), engine="numpy")
        own.start()

        def kill(child):
            while cpu_s(child) < 0.01:  # not before it is at the proof
                pass
            with ends_of([child]):
                os.kill(child, signal.SIGSTOP)  # as while it rests
                os.kill(own.helper_pid, signal.SIGKILL)

        assert isinstance(_while_proving(own, slow, kill), ProvingError)
        assert own.prove(*claim(), None).memory_bytes >= 0
        assert Path(f"/proc/{own.helper_pid}/cmdline").read_bytes().split(b"\0")[-2] == b"numpy"


def test_the_helper_and_what_it_tries_end_with_a_server_that_is_killed(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "slow", 1, **{"network.onnx": endless()})
    script = (
        "import sys; from pathlib import Path; from model_store.bundle.files import read_bundle;"
        "from server.proving.prover import ProofLimits, Prover; prover = Prover('numpy'); prover.start();"
        "print(prover.helper_pid, flush=True); limits = ProofLimits('numpy', None, 4 << 30, 60.0);"
        "prover.prove(read_bundle(Path(sys.argv[1])), limits, None)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "slow")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        helper = int(server.stdout.readline())
        while not (found := children(helper)):
            assert server.poll() is None
        with ends_of([helper, *found]):
            server.kill()


def test_the_helper_imports_the_engine_that_is_served_and_a_proof_by_one_that_is_not_there_says_so(
    claim, tmp_path, monkeypatch
):
    package = tmp_path / "stand-in/openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    for engine in ("numpy", "openvino"):
        with closing(Prover(engine)) as own:
            assert own.prove(*claim(engine="numpy"), None).memory_bytes > 0
            with pytest.raises(ProvingError, match="engine 'openvino' lacks openvino; pip install openvino"):
                own.prove(*claim(), None)


@needs_training
def test_what_a_proof_logs_is_in_the_servers_log_and_in_its_form(claim, caplog, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the engine warns where it finds no GPU
    with closing(Prover("torch")) as prover:
        prover.prove(*claim(engine="torch"), None)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("kernels.gpu.torch_backend", "WARNING")
    assert record.getMessage().startswith("PyTorch finds no GPU")
    assert capfd.readouterr().err == ""


def test_a_gpu_that_is_not_there_is_not_the_bundles_fault(prover, claim):
    with pytest.raises(ProvingError, match="there is no CUDA device|is not installed|pip install"):
        prover.prove(*claim(engine="tensorrt", device=63), None)


def test_the_process_that_proves_cannot_write_into_the_servers_log(claim, tmp_path, monkeypatch, caplog, capfd):
    package = tmp_path / "stand-in/openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os\nclass Core:\n    def read_model(self, network):\n"
        "        os.write(2, b'forged\\n' * 1_000)\n        raise RuntimeError('said it')\n"
        "class InferRequest: pass\nclass Tensor: pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path]))
    with closing(Prover("openvino", nice=0)) as own, pytest.raises(BundleError, match="said it"):
        own.prove(*claim(), None)
    told = {(record.name, record.getMessage()) for record in caplog.records}
    assert ("server.proving.helper", "the proving process says: forged") in told or (
        "__main__", "the proving process says: forged"
    ) in told  # fmt: skip
    assert "forged" not in capfd.readouterr().err
