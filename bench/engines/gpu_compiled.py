"""Compile the Triton kernel with every launch, without a GPU, and predict its speed from the compiler's output.

`python -m bench.engines.gpu_compiled 9.0` prints the facts as JSON lines. Tests use this command, because compiling
needs a process in which Triton does not interpret kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from bench.engines.machine_code import flop, issued, loaded_bytes, total
from bench.harness import Claim, Conclusion, Raw, markdown_table
from kernels.encoder import EncoderShape
from kernels.gpu.tiles import Launch
from kernels.gpu.triton_ahead import CompiledKernel, arguments, compiled
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.network.encoder import EarlyFusion
from ranker.network.model import NetworkConfig
from ranker.network.serving_form import fold_early

LAUNCHES = tuple(Launch(block, warps) for block in (32, 64, 128) for warps in (4, 8))
#: Shared memory limit of a program, by compute capability (CUDA C++ Programming Guide).
SHARED_BYTES_MAX = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "12.0": 99 << 10}
#: The architecture for which instructions are counted and rows/s are predicted: H100 and H200.
COUNTED = "9.0"
#: Its registers and shared memory bytes per multiprocessor, and the bytes that each program needs in addition.
_REGISTERS, _SHARED_BYTES, _RESERVED_BYTES = 1 << 16, 228 << 10, 1 << 10
MULTIPROCESSORS, _CLOCK_HZ, _ISSUED_A_CYCLE = 132, 1.755e9, 4
#: Cycles that a program stalls per barrier: for its loads, its products and the barrier itself.
_STILL = (150, 300)
#: Sizes of the compiled encoder: the published ones, with 100 actions.
_PUBLISHED, _LENGTH = NetworkConfig(heads=1, actions=4, surfaces=1, scalars=1), 100
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one launch on one architecture. Counts are per row of the published encoder with 100 actions.

    Attributes:
        fits: whether the architecture has enough shared memory for a program.
        spilled_bytes: bytes of stack reads and writes of a thread, each place in the code counted once.
        serialised: whether each product waits for the previous one, because registers are short.
        issued: instructions of all warps of a program.
        local: the instructions among them that access the stack.
        programs: concurrent programs on a multiprocessor.
        rows_s: predicted rows/s, low and high; see `predicted`.
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
    """Predict rows/s, low and high, of 132 multiprocessors at 1.755 GHz.

    The cycles of a row are the larger of two values: the issued instructions, at 4 per cycle and multiprocessor; and
    the time of a program, divided by the number of concurrent programs. The time of a program is the issue time of its
    warps, a quarter of them on each of four schedulers, plus 150 to 300 cycles per barrier. That range is an
    assumption, chosen so that the first version that compiled reaches the 7 to 12 million rows/s that were expected of
    it.
    """
    rows = []
    for still in reversed(_STILL):
        alone = issued_instructions / warps * -(-warps // 4) + barriers * still
        rows.append(MULTIPROCESSORS * _CLOCK_HZ / max(issued_instructions / _ISSUED_A_CYCLE, alone / programs))
    return rows[0], rows[1]


def facts(launches: Iterable[Launch], architecture: str) -> Iterable[Facts]:
    """Compile the kernel of the published encoder with each launch, and analyse the result."""
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
    """Assemble PTX with NVIDIA's assembler, and return its report on registers and memory."""
    target = _found(r"\.target (\w+)", source.read_text())
    ptxas = get_ptxas(int(_found(r"(\d+)", target))).path
    command = [ptxas, "-v", "--gpu-name", target, source, "-o", source.with_suffix(".out")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the output of NVIDIA's tool: {text[:200]!r}")
    return found[1]


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Compile every launch for every architecture; if `quick`, only the default launch for `COUNTED`."""
    launches = (Launch(),) if quick else LAUNCHES
    found: list[dict[str, Any]] = []
    for name in (COUNTED,) if quick else SHARED_BYTES_MAX:
        found += [_kept(one) for one in facts(launches, name)]
        yield {"triton": triton.__version__, "facts": found}


def conclude(raw: Raw) -> Conclusion:
    found = [Facts(**one, **dict.fromkeys(_UNKEPT)) for one in raw["facts"]]  # type: ignore[arg-type]  # only tests read them
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
    return Conclusion(summary, claims, table(found, raw["triton"]))


def table(found: Sequence[Facts], version: str) -> str:
    """Return two Markdown tables: the facts of every launch on `COUNTED`, and the architectures that it fits."""
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
        f"Triton {version}, the published encoder over {_LENGTH} actions. The default is "
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


_UNKEPT = ("assembler", "parameters", "arguments")


def _kept(one: Facts) -> dict[str, Any]:
    """Return the facts for the committed result, without the assembler's output, which only tests need."""
    return {name: value for name, value in asdict(one).items() if name not in _UNKEPT}


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        for one in facts(LAUNCHES if wanted == COUNTED else (Launch(),), wanted):
            print(json.dumps(asdict(one)))
