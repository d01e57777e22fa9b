"""`python -m tests.kernels.gpu.compile_ahead 9.0`: the kernel compiled for the published encoder, and what came out.

In a process of its own: in the tests' own Triton interprets.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas

from kernels.fused_encoder import EncoderShape
from kernels.gpu.triton_ahead import arguments, compiled
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.encoder import EarlyFusion
from ranker.serving_form import fold_early
from tests.ranker.encoders import Sizes


def assembled(ptx: str) -> str:
    """Assemble PTX with NVIDIA's own assembler, and return what it says of registers and memory."""
    target = next(line.split()[1] for line in ptx.splitlines() if line.startswith(".target")).rstrip(",")
    ptxas = get_ptxas(int(target[3:].rstrip("af"))).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", "--gpu-name", target, source, "-o", Path(folder) / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> None:
    weights = {name: weight.detach().numpy() for name, weight in fold_early(EarlyFusion(Sizes()).eval()).items()}
    encoder = TritonEncoder(weights, EncoderShape(100, Sizes().readout_rows, 2))
    for architecture in sys.argv[1:]:
        ahead = compiled(encoder, architecture)
        head = ahead.ptx[ahead.ptx.index(".entry") :]
        parameters = head[: head.index("\n)")].count(".param")
        facts = {
            "architecture": architecture,
            "name": ahead.name,
            "arguments": len(arguments()),
            "parameters": parameters,
            "threads": ahead.threads,
            "shared_bytes": ahead.shared_bytes,
            "assembler": assembled(ahead.ptx),
            "products": ahead.ptx.count("mma"),
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
