"""Collect the lines of a folder: every measured number, and a reason for every missing one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.numbers import WITHOUT, NumbersFile, finite
from bench.gpu.plan import PHASES, expected
from bench.harness import Claim

#: Goals in rows/s on one H200, for the encoder and for the whole ranker.
ENCODER_GOAL, RANKER_GOAL = 10e6, 5e6
#: Largest difference from the published form in float64, relative to a row's norm.
PARITY_MAX = 1e-2

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """The collected lines of a folder.

    Attributes:
        dry_run: whether they are from a dry run and mean nothing.
        lines: the last line for each (phase, number), measured ones preferred, in the order of the phases.
        unreadable: number of lines that a kill has cut off.
    """

    dry_run: bool
    lines: Mapping[tuple[str, str], Line]
    unreadable: int

    def of(self, phase: str) -> Iterator[tuple[str, Line]]:
        """Return the lines of a phase by the name of their number, measured or not."""
        return ((what, line) for (of, what), line in self.lines.items() if of == phase and what != "the phase")

    def value(self, phase: str, what: str, key: str) -> float | None:
        value = self.lines.get((phase, what), {}).get(key)
        return float(value) if isinstance(value, int | float) else None


def results(found: NumbersFile, *, dry_run: bool) -> Results:
    """Sort the lines, and add a line for every missing number."""
    last: dict[tuple[str, str], Line] = {}
    for line in found.lines:
        place = line["phase"], str(line["what"])
        if bool(line.get("dry_run")) is dry_run and (
            "not_measured" not in line or "not_measured" in last.get(place, line)
        ):
            last[place] = line
    ordered: dict[tuple[str, str], Line] = {}
    for phase in PHASES:
        ended = last.get((phase, "the phase"), {"ended": "the phase did not run to its end"})
        why = ended.get("ended", WITHOUT)
        for what in expected(phase, dry_run=dry_run):
            ordered[phase, what] = last.get((phase, what), {"phase": phase, "what": what, "not_measured": why})
        ordered |= {place: line for place, line in last.items() if place[0] == phase and place not in ordered}
    return Results(dry_run, ordered, found.unreadable)


def as_json(found: Results) -> dict[str, Any]:
    """Return the numbers in the form of all benchmark results."""
    numbers = [line for (_, what), line in found.lines.items() if what != "the phase"]
    missing = sum("not_measured" in line for line in numbers)
    return {
        "name": "gpu",
        "dry_run": found.dry_run,
        "claims": [] if found.dry_run else [finite(claim.as_json()) for claim in _claims(found)],
        "summary": {"numbers": len(numbers) - missing, "not measured": missing},
        "raw": {"lines": list(found.lines.values()), "unreadable": found.unreadable},
    }


def _claims(found: Results) -> Iterator[Claim]:
    """Compare the measured numbers with the requirements. There is no claim for a missing number."""
    differences = [
        float(line["relative_difference"]) for _, line in found.of("parity") if "relative_difference" in line
    ]
    if differences:
        worst = max(differences, key=lambda one: (math.isnan(one), one))  # NaN is the worst
        yield Claim("largest relative difference of the fused kernel", worst, PARITY_MAX, "", "at_most")
    for phase, goal, name in (("encoder", ENCODER_GOAL, "encoder"), ("engine", RANKER_GOAL, "whole ranker")):
        rates = [
            float(line["rows_s"]) for what, line in found.of(phase) if "rows_s" in line and "published" not in what
        ]
        if rates:
            yield Claim(f"{name}, its best batch", max(rates), goal, "rows/s", "at_least")
