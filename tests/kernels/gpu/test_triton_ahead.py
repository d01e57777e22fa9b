"""The fused kernel compiled for GPUs that are not there, by the compiler and assembler that would be used with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kernels.engine import EngineError
from kernels.fused_encoder import EncoderShape
from kernels.gpu.triton_ahead import compiled
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.encoder import EarlyFusion
from ranker.serving_form import fold_early
from tests.ranker.encoders import Sizes

#: Shared memory that one program may have, by compute capability (CUDA C++ Programming Guide).
SHARED_BYTES_MAX = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "12.0": 99 << 10}


@pytest.fixture(scope="module")
def ahead():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_ahead", *SHARED_BYTES_MAX]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {facts["architecture"]: facts for facts in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("architecture", SHARED_BYTES_MAX)
def test_the_kernel_compiles_for_every_architecture_and_a_program_fits(ahead, architecture):
    facts = ahead[architecture]
    assert facts["shared_bytes"] <= SHARED_BYTES_MAX[architecture]
    assert facts["products"] > 0, "products run on the tensor cores"


@pytest.mark.parametrize("architecture", SHARED_BYTES_MAX)
def test_the_entry_takes_its_arguments_and_nothing_else(ahead, architecture):
    facts = ahead[architecture]
    assert facts["parameters"] == facts["arguments"]
    assert f"Compiling entry function '{facts['name']}'" in facts["assembler"]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the tests compile kernels instead of interpreting them"
)
def test_an_interpreter_compiles_nothing():
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes()).eval()).items()}
    encoder = TritonEncoder(weights, EncoderShape(100, 10, 2))
    with pytest.raises(EngineError, match="unset TRITON_INTERPRET"):
        compiled(encoder, "9.0")
