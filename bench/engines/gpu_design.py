"""Predict the speed of the next encoder kernel from the instructions that NVIDIA's compiler generates for its loops.

The design, `gpu_design.cu`, consists only of the inner loops; nothing launches it. It is compiled for 9.0 without a
GPU. The instruction counts give the rows/s that the chip's units allow, and the rows/s that are likely at the
utilisation that the current kernel is predicted to reach. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.harness import RESULTS, BenchmarkError, Conclusion, Raw
from kernels.gpu.tiles import Launch

SOURCE = Path(__file__).with_suffix(".cu")
_TARGET = ("-gencode", "arch=compute_90a,code=sm_90a")

#: Of an H100 or H200: multiprocessors, their clock rate, and warp instructions that each can start per clock.
_MULTIPROCESSORS, _CLOCK_HZ, _ISSUES = 132, 1.755e9, 4
#: Clocks of a multiprocessor for one m16n8k16 product: 4,096 operations at a rate of 4,096 per clock, of which `mma`
#: (unlike `wgmma`) reaches about 62% on this chip (Luo et al., Benchmarking and Dissecting the Nvidia Hopper
#: GPU Architecture, 2024).
_PRODUCT_CLOCKS = 1 / 0.62
#: Clocks of a multiprocessor for a warp's access to shared memory, at 128 bytes per clock.
_SHARED_CLOCKS = {"LDSM": 4, "STSM": 4, "LDS": 1, "STS": 1}
#: Passes of a candidate's row through each loop: seven warps share layer 1, and the ten rows of each of seven
#: candidates are packed into five tiles of sixteen.
_PASSES = {"layer1ILi2": 7 / 2, "layer2_attention": 1.0, "layer2_queries": 5 / 7, "layer2_tail": 5 / 7}
#: The candidate's own maps and exponentials, as small products of eight candidates: an estimate, not compiled.
_UNCOMPILED = 100.0

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TO = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Loop:
    """One kernel's innermost loop with matrix products.

    Attributes:
        name: mangled name of the kernel.
        instructions: counts by the first part of the operation's name, such as `HMMA`.
        registers: registers of a thread.
        spilled_bytes: bytes that a thread stores and loads because of spills.
    """

    name: str
    instructions: Counter[str]
    registers: int
    spilled_bytes: int


def measure(*, quick: bool = False) -> Iterator[Raw]:  # noqa: ARG001 - it takes only a second
    """Compile the design and count its instructions."""
    kernels = {
        loop.name: {"registers": loop.registers, "spilled_bytes": loop.spilled_bytes, "loop": dict(loop.instructions)}
        for loop in compiled()
    }
    yield {"kernels": kernels, "passes a row": _PASSES, "shares": _shares(), "compiler": _version()}


def conclude(raw: Raw) -> Conclusion:
    loops = {name: one["loop"] for loop, one in raw["kernels"].items() for name in _PASSES if name in loop}
    a_row: Counter[str] = Counter()
    for name, passes in raw["passes a row"].items():
        for kind, count in loops[name].items():
            a_row[kind] += count * passes
    issued = sum(a_row.values()) + _UNCOMPILED
    clocks = {
        "issue": issued / _ISSUES,
        "products": a_row["HMMA"] * _PRODUCT_CLOCKS,
        "shared memory": sum(a_row[kind] * clocks for kind, clocks in _SHARED_CLOCKS.items()),
    }
    bounds = {name: _MULTIPROCESSORS * _CLOCK_HZ / value for name, value in clocks.items()}
    low, high = (share * bounds["issue"] for share in raw["shares"])
    summary = {
        "warp instructions a row": issued,
        "MFLOP a row, padding included": a_row["HMMA"] * 4096 / 1e6,
        **{f"rows/s that {name} allow": value for name, value in bounds.items()},
        "predicted rows/s, low": low,
        "predicted rows/s, high": min(high, *bounds.values()),
    }
    return Conclusion(summary, ())


def _shares() -> tuple[float, float]:
    """Return the predicted issue utilisation of the current kernel, low and high."""
    facts = json.loads((RESULTS / "gpu_compiled.json").read_text())["raw"]["facts"]
    default = ("9.0", Launch().block, Launch().warps)
    present = next(one for one in facts if (one["architecture"], one["block"], one["warps"]) == default)
    low, high = (rows_s * present["issued"] / (_MULTIPROCESSORS * _CLOCK_HZ * _ISSUES) for rows_s in present["rows_s"])
    return low, high


def compiled(source: Path = SOURCE) -> list[Loop]:
    """Compile for 9.0 and return the loop of every kernel. Raises BenchmarkError without nvcc and cuobjdump."""
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as folder:
        cubin = Path(folder) / "design.cubin"
        done = subprocess.run(
            [_tool("nvcc"), "-std=c++17", "-O3", *_TARGET, "-Xptxas", "-v", "-cubin", "-o", cubin, source],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BenchmarkError(f"nvcc cannot compile {source.name}: {done.stderr[-2000:]}")
        listing = subprocess.run(
            [_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    resources = _resources(done.stderr)
    return [
        Loop(name, loop_of(text), *resources[name])
        for name, _, text in (part.partition("\n") for part in listing.split("Function : ")[1:])
    ]


def loop_of(listing: str) -> Counter[str]:
    """Return the instructions of a kernel's last backward branch that encloses matrix products.

    Args:
        listing: listing of one function, as printed by `cuobjdump -sass`.

    Raises:
        BenchmarkError: the listing has no such loop.
    """
    lines = [(int(found[1], 16), found[2], found[3]) for found in _INSTRUCTION.finditer(listing)]
    best: Counter[str] = Counter()
    for address, name, operands in lines:
        to = _TO.search(operands)
        if not name.startswith("BRA") or to is None or int(to[1], 16) >= address:
            continue
        body = Counter(name.partition(".")[0] for at, name, _ in lines if int(to[1], 16) <= at <= address)
        if body["HMMA"]:
            best = body
    if not best:
        raise BenchmarkError("the listing has no loop with matrix products")
    return best


def _resources(said: str) -> dict[str, tuple[int, int]]:
    """Return registers and spilled bytes by kernel, from the output of ptxas."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        stores, loads = (int(re.search(rf"(\d+) bytes spill {way}", part)[1]) for way in ("stores", "loads"))  # type: ignore[index]
        found[part.partition("'")[0]] = int(re.search(r"Used (\d+) registers", part)[1]), stores + loads  # type: ignore[index]
    return found


def _version() -> str:
    said = subprocess.run([_tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return said.strip().splitlines()[-1]


def _tool(name: str) -> str:
    """Return the path of a CUDA tool: from PATH, or from the Triton package."""
    found = shutil.which(name)
    if found is None and name != "nvcc":
        try:
            from triton.backends import nvidia  # noqa: PLC0415

            beside = Path(nvidia.__path__[0]) / "bin" / name
            found = str(beside) if beside.exists() else None
        except ImportError:
            found = None
    if found is None:
        raise BenchmarkError(f"{name} is missing; install the CUDA toolkit 13")
    return found
