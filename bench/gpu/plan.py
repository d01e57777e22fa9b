"""The plan of a GPU run: phases, their order and time limits. Pure data, without a clock."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

#: Batches of the encoder: (requests, rows of each request).
SHAPES = ((1, 128), (1, 1024), (4, 512), (16, 128), (16, 512), (64, 256), (64, 512))
DRY_SHAPES = ((1, 2), (2, 2))
#: The batches among them that the engine runs with the whole ranker.
ENGINE_SHAPES = ((1, 512), (4, 512), (16, 512), (64, 512))
#: Actions of a request; a dry run has enough for two blocks of 32.
LENGTH, DRY_LENGTH = 100, 40
#: Ways to compile the kernel: (actions of a block, warps of a program). The first is the default.
COMPILED = ((128, 8), (64, 4), (128, 4), (32, 4), (64, 8), (32, 8))
DRY_COMPILED = ((64, 4), (32, 4))
#: Rows in a tile. The first is the default for large batches.
TILE_ROWS = (8, 4, 16, 2, 32)
#: Shapes for tuning: many rows, and one request.
TUNED_SHAPES = ((64, 256), (1, 512))
#: Requests per second, with 512 candidates each.
RATES_PER_S = (200, 1000, 3000)
DRY_RATES_PER_S = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class GpuPhase:
    """A part of the run, in its own process, with a guaranteed number of seconds."""

    name: str
    limit_s: float


PHASES = {
    phase.name: phase
    for phase in (
        GpuPhase("facts", 15),
        GpuPhase("parity", 60),
        GpuPhase("ceilings", 10),
        GpuPhase("encoder", 40),
        GpuPhase("tuning", 70),
        GpuPhase("ncu", 40),
        GpuPhase("sanitizer", 30),
        GpuPhase("engine", 70),
        GpuPhase("two-engines", 15),
        GpuPhase("served", 75),
        GpuPhase("public", 35),
        GpuPhase("table", 20),
    )
}
#: The phases of the ten-minute run, and of the four-minute rerun.
TEN_MINUTES = tuple(PHASES)
FOUR_MINUTES = ("facts", "parity", "ceilings", "encoder", "engine", "table")


class PlanError(Exception):
    """The run cannot be planned. The message says why."""


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """A phase in a run.

    Attributes:
        starts_at_s: latest start, in seconds after the start of the run. It is earlier if previous phases need less.
        limit_s: time limit in seconds, if it starts then. Unused time of previous phases is added.
        command: command line.
    """

    name: str
    starts_at_s: float
    limit_s: float
    command: tuple[str, ...]

    @property
    def ends_at_s(self) -> float:
        """The time of its kill, in seconds after the start of the run, so that no phase uses the time of the next."""
        return self.starts_at_s + self.limit_s


def plan(names: Sequence[str], out: str, *, dry_run: bool = False) -> tuple[PlannedPhase, ...]:
    """Return the phases of a run in order, the first at 0 s.

    Args:
        names: names of phases, each once, in any order.
        out: folder of the results.
        dry_run: whether to only try that the phases run.

    Raises:
        PlanError: a name is unknown or repeated.
    """
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        raise PlanError(f"there is no phase {unknown[0]!r}; use one of {', '.join(PHASES)}")
    if len(set(names)) < len(names):
        raise PlanError(f"a phase is named twice in {' '.join(names)}")
    planned, starts_at_s = [], 0.0
    for phase in PHASES.values():
        if phase.name in names:
            command = (sys.executable, "-m", "bench.gpu.phase", phase.name, "--out", out)
            planned.append(PlannedPhase(phase.name, starts_at_s, phase.limit_s, (*command, *["--dry-run"] * dry_run)))
            starts_at_s += phase.limit_s
    return tuple(planned)


def shape_name(requests: int, rows: int) -> str:
    """Return the name of a batch in the results."""
    return f"{requests} x {rows}"


def tuning_name(shape: tuple[int, int], compiled: tuple[int, int], tile_rows: int) -> str:
    """Return the name of one choice for the kernel in the results."""
    block, warps = compiled
    return f"{shape_name(*shape)}, block {block}, {warps} warps, tiles of {tile_rows}"


def expected(phase: str, *, dry_run: bool = False) -> tuple[str, ...]:
    """Return the names of the numbers that a phase should record. Those without a line were not measured."""
    shapes = DRY_SHAPES if dry_run else SHAPES
    return {
        "facts": ("card", "versions", "machine", "source"),
        "parity": tuple(parity_name(one) for one in (None, *(DRY_COMPILED if dry_run else COMPILED))),
        "ceilings": ("device", "bf16 product", "copy"),
        "encoder": (
            *(shape_name(*shape) for shape in shapes),
            *(f"{shape_name(*shape)}, published form" for shape in shapes[-1:]),
        ),
        "tuning": tuple(tuning_name(*one) for one in tunings(dry_run=dry_run)),
        "ncu": ("one launch",),
        "sanitizer": ("memcheck",),
        "engine": ("goldens", *(shape_name(*shape) for shape in engine_shapes(dry_run=dry_run)), "memory", "warm-up"),
        "two-engines": ("opened under load",),
        "served": ("start", *(f"{rate}/s" for rate in (DRY_RATES_PER_S if dry_run else RATES_PER_S))),
        "public": ("HSTU-like", "SKUT-like, our kernel", "SKUT-like, published form", "published form, compiled"),
        "table": (),
    }[phase]


def parity_name(compiled: tuple[int, int] | None) -> str:
    """Return the name of the check of one way to compile the kernel; None means the default way."""
    return "as it is" if compiled is None else f"block {compiled[0]}, {compiled[1]} warps"


def tunings(*, dry_run: bool = False) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    """Return (shape, way to compile, rows in a tile) of every choice, the most informative first."""
    if dry_run:
        return [(DRY_SHAPES[-1], compiled, 2) for compiled in DRY_COMPILED]
    many, one = TUNED_SHAPES
    return [
        *((many, compiled, TILE_ROWS[0]) for compiled in COMPILED),
        *((one, compiled, rows) for rows in (8, 4, 2, 1) for compiled in COMPILED[:3]),
        *((many, compiled, rows) for rows in TILE_ROWS[1:] for compiled in COMPILED),
    ]


def engine_shapes(*, dry_run: bool = False) -> tuple[tuple[int, int], ...]:
    """Return the batches for the whole ranker."""
    return ((1, 4), (2, 4), (4, 4), (2, 16)) if dry_run else ENGINE_SHAPES
