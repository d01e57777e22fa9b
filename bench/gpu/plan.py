"""What is measured on a GPU, in which order, and until when: plain data, and no clock."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

#: Requests x rows of each of the encoder's batches.
SHAPES = ((1, 128), (1, 1024), (4, 512), (16, 128), (16, 512), (64, 256), (64, 512))
DRY_SHAPES = ((1, 2), (2, 2))
#: Of those, what the engine runs as a whole ranker.
ENGINE_SHAPES = ((1, 512), (4, 512), (16, 512), (64, 512))
#: Actions of a request; in a dry run enough for two blocks of 32.
LENGTH, DRY_LENGTH = 100, 40
#: (actions of a block, warps of a program): how the kernel may be compiled; the first is what it does by itself.
COMPILED = ((128, 8), (64, 4), (128, 4), (32, 4), (64, 8), (32, 8))
DRY_COMPILED = ((64, 4), (32, 4))
#: Rows that a program takes; the first is what the kernel takes by itself where there are many.
TILE_ROWS = (8, 4, 16, 2, 32)
#: The shapes that tuning runs: many rows, and one request.
TUNED_SHAPES = ((64, 256), (1, 512))
#: Requests a second, of 512 candidates each.
RATES_PER_S = (200, 1000, 3000)
DRY_RATES_PER_S = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class GpuPhase:
    """A part of the run: a process of its own, which has so many seconds for certain."""

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
#: The ten-minute run, and the rerun of four minutes.
TEN_MINUTES = tuple(PHASES)
FOUR_MINUTES = ("facts", "parity", "ceilings", "encoder", "engine", "table")


class PlanError(Exception):
    """A run that cannot be planned; the message says why."""


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """A phase in a run.

    Attributes:
        starts_at_s: the latest start, after the run's own; a phase starts sooner where those before it need less.
        limit_s: what it has if it starts then; whatever is left of earlier phases comes on top.
        command: to run.
    """

    name: str
    starts_at_s: float
    limit_s: float
    command: tuple[str, ...]

    @property
    def ends_at_s(self) -> float:
        """When it is killed, after the run's start: no phase takes the next one's time."""
        return self.starts_at_s + self.limit_s


def plan(names: Sequence[str], out: str, *, dry_run: bool = False) -> tuple[PlannedPhase, ...]:
    """Return a run's phases in order, the first at 0 s.

    Args:
        names: of phases, each once, in any order.
        out: the folder of results.
        dry_run: whether they only show that they run.

    Raises:
        PlanError: a name is unknown or stands there twice.
    """
    unknown = [name for name in names if name not in PHASES]
    if unknown:
        raise PlanError(f"there is no phase {unknown[0]!r}; there are {', '.join(PHASES)}")
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
    """Return what a batch is called in the results."""
    return f"{requests} x {rows}"


def tuning_name(shape: tuple[int, int], compiled: tuple[int, int], tile_rows: int) -> str:
    """Return what one choice of the kernel's is called in the results."""
    block, warps = compiled
    return f"{shape_name(*shape)}, block {block}, {warps} warps, tiles of {tile_rows}"


def expected(phase: str, *, dry_run: bool = False) -> tuple[str, ...]:
    """Return the numbers that a phase is there for: what lacks a line afterwards was not measured."""
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
    """Return what the check of one way to compile the kernel is called in the results; None is the kernel's own way."""
    return "as it is" if compiled is None else f"block {compiled[0]}, {compiled[1]} warps"


def tunings(*, dry_run: bool = False) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    """Return (shape, compiled, rows in a tile) of every choice, what tells most first."""
    if dry_run:
        return [(DRY_SHAPES[-1], compiled, 2) for compiled in DRY_COMPILED]
    many, one = TUNED_SHAPES
    return [
        *((many, compiled, TILE_ROWS[0]) for compiled in COMPILED),
        *((one, compiled, rows) for rows in (8, 4, 2, 1) for compiled in COMPILED[:3]),
        *((many, compiled, rows) for rows in TILE_ROWS[1:] for compiled in COMPILED),
    ]


def engine_shapes(*, dry_run: bool = False) -> tuple[tuple[int, int], ...]:
    """Return the batches that the whole ranker runs."""
    return ((1, 4), (2, 4), (4, 4), (2, 16)) if dry_run else ENGINE_SHAPES
