"""What the compiler says of the fused kernel, without a GPU: for each way to launch it, and what is predicted of that.

`python -m bench.engines.gpu_compiled 9.0` prints the facts as JSON lines. Compiling needs a process in which Triton
does not interpret, so tests ask for them in that way.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from bench.engines.machine_code import flop, issued, loaded_bytes, total
from bench.harness import Claim, Measurement, markdown_table
from kernels.encoder import EncoderShape
from kernels.gpu.tiles import Launch
from kernels.gpu.triton_ahead import CompiledKernel, arguments, compiled
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.network.encoder import EarlyFusion
from ranker.network.model import NetworkConfig
from ranker.network.serving_form import fold_early

LAUNCHES = tuple(Launch(block, warps) for block in (32, 64, 128) for warps in (4, 8))
#: Shared memory that one program may have, by compute capability (CUDA C++ Programming Guide).
SHARED_BYTES_MAX = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "12.0": 99 << 10}
#: Where instructions are counted and rows a second predicted: H100 and H200.
COUNTED = "9.0"
#: A multiprocessor's of those: registers, bytes of shared memory, and what each program takes of them besides its own.
_REGISTERS, _SHARED_BYTES, _RESERVED_BYTES = 1 << 16, 228 << 10, 1 << 10
MULTIPROCESSORS, _CLOCK_HZ, _ISSUED_A_CYCLE = 132, 1.755e9, 4
#: Cycles that a program stands still from one barrier to the next, for its loads, products and the barrier itself.
_STILL = (150, 300)
#: Of the encoder that is compiled: the published sizes, over 100 actions.
_PUBLISHED, _LENGTH = NetworkConfig(heads=1, actions=4, surfaces=1, scalars=1), 100
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one launch on one architecture; counts are per row of the published encoder over 100 actions.

    Attributes:
        fits: whether the architecture gives a program this much shared memory.
        spilled_bytes: written to and read from a thread's stack, once each place in the code.
        serialised: whether the assembler makes each product wait for the one before it, for want of registers.
        issued: of all warps of the program.
        local: of those, to and from the stacks.
        programs: on a multiprocessor at once.
        rows_s: predicted, low and high: see `predicted`.
    """

    architecture: str
    block: int
    warps: int
    fits: bool
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int
    tensor_instructions: tuple[str, ...]
    serialised: bool
    parameters: int
    arguments: int
    assembler: str
    issued: int = 0
    local: int = 0
    barriers: int = 0
    mflop: float = 0.0
    loaded_kb: float = 0.0
    programs: int = 0
    rows_s: tuple[float, float] = (0.0, 0.0)


def predicted(issued_instructions: int, warps: int, barriers: int, programs: int) -> tuple[float, float]:
    """Return rows a second, low and high, of all 132 multiprocessors at 1.755 GHz.

    Cycles a row are the larger of two: what is issued over the 4 instructions a cycle that a multiprocessor can, and
    the time of one program over the programs at once. A program's time is what its warps issue in turn, a quarter of
    them on each of four schedulers, and 150 to 300 cycles for each of its barriers: an assumption, by which the first
    version that compiled comes to the 7 to 12 million that were expected of it.
    """
    rows = []
    for still in reversed(_STILL):
        alone = issued_instructions / warps * -(-warps // 4) + barriers * still
        rows.append(MULTIPROCESSORS * _CLOCK_HZ / max(issued_instructions / _ISSUED_A_CYCLE, alone / programs))
    return rows[0], rows[1]


def facts(launches: Iterable[Launch], architecture: str) -> Iterable[Facts]:
    """Compile the published encoder's kernel in each way, and read what came out."""
    module = EarlyFusion(_PUBLISHED).eval()
    weights = {name: weight.detach().numpy() for name, weight in fold_early(module).items()}
    for launch in launches:
        encoder = TritonEncoder(weights, EncoderShape(_LENGTH, _PUBLISHED.readout_rows, 2), launch)
        yield _facts(launch, encoder, compiled(encoder, architecture), architecture)


def _facts(launch: Launch, encoder: TritonEncoder, ahead: CompiledKernel, architecture: str) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.cubin"
        code.write_bytes(ahead.cubin)
        used = _said(knobs.nvidia.cuobjdump.path, "-res-usage", code)
        text = _said(knobs.nvidia.nvdisasm.path, "-c", code)
        source = Path(folder) / "kernel.ptx"
        source.write_text(ahead.ptx)
        assembler = _assembled(source)
    registers, stack = (int(_found(rf"{what}:(\d+)", used)) for what in ("REG", "STACK"))
    head = ahead.ptx[ahead.ptx.index(".entry") :]
    made = Facts(
        architecture=architecture,
        block=launch.block,
        warps=launch.warps,
        fits=ahead.shared_bytes <= SHARED_BYTES_MAX[architecture],
        registers=registers,
        stack_bytes=stack,
        spilled_bytes=sum(int(_found(rf"(\d+) bytes spill {way}", assembler)) for way in ("stores", "loads")),
        shared_bytes=ahead.shared_bytes,
        tensor_instructions=tuple(sorted(set(re.findall(r"\bHG?MMA\.[\w.]+", text)))),
        serialised="C7511" in assembler,
        parameters=head[: head.index("\n)")].count(".param"),
        arguments=len(arguments()),
        assembler=assembler,
    )
    return _counted(made, text, encoder) if architecture == COUNTED else made


def _counted(made: Facts, text: str, encoder: TritonEncoder) -> Facts:
    found = issued(text, int(encoder.constants["L"]) // int(encoder.constants["B"]) - 1)
    registers = -(-made.registers // 8) * 8 * 32 * made.warps
    programs = min(_REGISTERS // registers, _SHARED_BYTES // (made.shared_bytes + _RESERVED_BYTES))
    count, barriers = total(found) * made.warps, total(found, "BAR")
    return replace(
        made,
        issued=count,
        local=total(found, "LDL", "STL") * made.warps,
        barriers=barriers,
        mflop=round(flop(found, made.warps) / 1e6, 2),
        loaded_kb=round(loaded_bytes(found, made.warps) / 1e3, 1),
        programs=programs,
        rows_s=predicted(count, made.warps, barriers, programs),
    )


def _assembled(source: Path) -> str:
    """Assemble PTX with NVIDIA's own assembler, and return what it says of registers and memory."""
    target = _found(r"\.target (\w+)", source.read_text())
    ptxas = get_ptxas(int(_found(r"(\d+)", target))).path
    command = [ptxas, "-v", "--gpu-name", target, source, "-o", source.with_suffix(".out")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what NVIDIA's tool says: {text[:200]!r}")
    return found[1]


def measure(*, quick: bool = False) -> Measurement:
    """Compile every launch for every architecture; `quick`, the default launch for the one that is counted."""
    launches = (Launch(),) if quick else LAUNCHES
    found = [one for name in ((COUNTED,) if quick else SHARED_BYTES_MAX) for one in facts(launches, name)]
    default = next(one for one in found if one.architecture == COUNTED and _launch(one) == Launch())
    claims = (
        Claim("the default launch issues for a row", default.issued, 20_000, "warp instructions", "at_most"),
        Claim("the default launch's barriers a row", default.barriers, 60, "barriers", "at_most"),
        Claim("the default launch spills", default.spilled_bytes, 64, "bytes", "at_most"),
    )
    summary = {
        "warp instructions a row": float(default.issued),
        "barriers a row": float(default.barriers),
        "predicted rows a second, low": default.rows_s[0],
        "predicted rows a second, high": default.rows_s[1],
    }
    return Measurement(
        summary, claims, {"triton": triton.__version__, "facts": [_kept(one) for one in found]}, table(found)
    )


def table(found: Iterable[Facts]) -> str:
    """Return both tables in Markdown: every launch where instructions are counted, and where each of them runs."""
    found = list(found)
    counted = [_line(one) for one in found if one.architecture == COUNTED]
    header = (
        "block x warps", "registers", "stack, bytes", "spilled, bytes", "shared, KiB", "barriers a row",
        "warp instructions a row", "of them to the stack", "products", "MFLOP a row", "loaded, KB a row",
        "programs a multiprocessor", "predicted rows/s", "measured rows/s",
    )  # fmt: skip
    names = list(dict.fromkeys(one.architecture for one in found))
    where = []
    for launch in dict.fromkeys(_launch(one) for one in found):
        ours = {one.architecture: one for one in found if _launch(one) == launch}
        where.append((_name_of(launch), *(_fit(ours[name]) for name in names)))
    about = (
        f"Triton {triton.__version__}, the published encoder over {_LENGTH} actions. The default is "
        f"{_name_of(Launch())}.\nRows a second are what `predicted` in `bench/engines/gpu_compiled.py` says of an "
        "H100. It charges a spill as\nan "
        "instruction and nothing for the wait: what spills much does less than it says.\n\n"
    )
    return (
        about
        + markdown_table(f"What the compiler says, compute capability {COUNTED}", header, counted)
        + "\n"
        + markdown_table("Shared memory of a program, KiB, by compute capability", ("block x warps", *names), where)
    )


def _line(one: Facts) -> tuple[str, ...]:
    low, high = (rows / 1e6 for rows in one.rows_s)
    return (
        _name_of(_launch(one)), str(one.registers), str(one.stack_bytes), str(one.spilled_bytes),
        f"{one.shared_bytes / 1024:.0f}", str(one.barriers), f"{one.issued:,}", f"{one.local:,}",
        ", ".join(_kinds(one)), f"{one.mflop:.1f}", f"{one.loaded_kb:.0f}", str(one.programs),
        f"{low:.1f} to {high:.1f}M", NOT_MEASURED,
    )  # fmt: skip


def _launch(one: Facts) -> Launch:
    return Launch(one.block, one.warps)


def _name_of(launch: Launch) -> str:
    return f"{launch.block} x {launch.warps}"


def _fit(one: Facts) -> str:
    return f"{one.shared_bytes / 1024:.0f}" if one.fits else f"{one.shared_bytes / 1024:.0f}, does not fit"


def _kinds(one: Facts) -> list[str]:
    names = {"HGMMA": "wgmma", "HMMA": "mma"}
    kinds = [names[kind] for kind in sorted({kind.split(".")[0] for kind in one.tensor_instructions})]
    return [*kinds, "serialised"] if one.serialised else kinds


def _kept(one: Facts) -> dict[str, Any]:
    """Return what the committed result keeps; the assembler's words are the tests'."""
    return {name: value for name, value in asdict(one).items() if name not in {"assembler", "parameters", "arguments"}}


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        for one in facts(LAUNCHES if wanted == COUNTED else (Launch(),), wanted):
            print(json.dumps(asdict(one)))
