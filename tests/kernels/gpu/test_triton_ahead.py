"""The fused kernel compiled for GPUs that are not there, by the compiler and assembler that would be used with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.runtime.errors import PTXASError

from bench.engines.gpu_compiled import COUNTED, LAUNCHES, MULTIPROCESSORS, SHARED_BYTES_MAX
from bench.harness import RESULTS
from kernels.encoder import EncoderShape
from kernels.engine import EngineError
from kernels.gpu import triton_ahead
from kernels.gpu.tiles import PROGRAMS, Launch
from kernels.gpu.triton_ahead import compiled
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.network.encoder import EarlyFusion
from ranker.network.serving_form import fold_early
from tests.ranker.encoders import Sizes

#: Of the committed table: another assembler may need so much more of anything before somebody should look.
SLACK = 1.1


@pytest.fixture(scope="module")
def compiled_facts():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.engines.gpu_compiled", *SHARED_BYTES_MAX]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def default_facts(compiled_facts):
    default = Launch()
    ours = [one for one in compiled_facts if (one["block"], one["warps"]) == (default.block, default.warps)]
    return {one["architecture"]: one for one in ours}


@pytest.mark.parametrize("architecture", SHARED_BYTES_MAX)
def test_the_kernel_compiles_for_every_architecture_and_a_program_fits(default_facts, architecture):
    facts = default_facts[architecture]
    assert facts["shared_bytes"] <= SHARED_BYTES_MAX[architecture]
    assert facts["tensor_instructions"], "products run on the tensor cores"


@pytest.mark.parametrize("architecture", SHARED_BYTES_MAX)
def test_the_entry_takes_its_arguments_and_nothing_else(default_facts, architecture):
    facts = default_facts[architecture]
    assert facts["parameters"] == facts["arguments"]
    assert "Compiling entry function 'encode_rows'" in facts["assembler"]


def test_the_default_launch_uses_wgmma_and_hardly_spills(default_facts):
    facts = default_facts[COUNTED]
    assert any(name.startswith("HGMMA") for name in facts["tensor_instructions"])
    assert facts["spilled_bytes"] <= 512
    assert facts["programs"] * MULTIPROCESSORS >= PROGRAMS, "what small batches are spread over"


def test_every_launch_needs_no_more_than_the_committed_table_says(compiled_facts):
    """Counts are compared with the Triton of the table only: another one allocates registers anew."""
    committed = json.loads((RESULTS / "gpu_compiled.json").read_text())["raw"]
    table = {(one["block"], one["warps"]): one for one in committed["facts"] if one["architecture"] == COUNTED}
    found = {(one["block"], one["warps"]): one for one in compiled_facts if one["architecture"] == COUNTED}
    assert found.keys() == table.keys() == {(launch.block, launch.warps) for launch in LAUNCHES}
    for launch, facts in found.items():
        assert facts["fits"], launch
        assert facts["registers"] <= 255, launch
        if committed["triton"] == triton.__version__:
            assert [kind.split(".")[0] for kind in facts["tensor_instructions"]] == [
                kind.split(".")[0] for kind in table[launch]["tensor_instructions"]
            ], launch
            assert facts["serialised"] == table[launch]["serialised"], (launch, facts["assembler"])
            for count in ("registers", "spilled_bytes", "shared_bytes", "barriers", "issued", "local"):
                assert facts[count] <= SLACK * table[launch][count], (launch, count)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the tests compile kernels instead of interpreting them"
)
def test_an_interpreter_compiles_nothing():
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes()).eval()).items()}
    encoder = TritonEncoder(weights, EncoderShape(100, 10, 2))
    with pytest.raises(EngineError, match="unset TRITON_INTERPRET"):
        compiled(encoder, "9.0")


def test_what_the_assembler_refuses_is_an_engine_error(monkeypatch):
    """Which Triton raises as no RuntimeError, and as no CompilationError."""

    def refused(*_, **__):
        raise PTXASError("too many registers")

    monkeypatch.setattr(triton_ahead, "InterpretedFunction", ())
    monkeypatch.setattr(triton_ahead, "ASTSource", lambda *_: None)
    monkeypatch.setattr(triton_ahead.triton, "compile", refused)
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes()).eval()).items()}
    with pytest.raises(EngineError, match="cannot compile the encoder for 9.0: PTXAS error: too many registers"):
        compiled(TritonEncoder(weights, EncoderShape(100, 10, 2)), "9.0")
