"""What a folder's lines say: everything that was measured, and a reason for everything that was not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.numbers import WITHOUT, NumbersFile, finite
from bench.gpu.plan import PHASES, expected
from bench.harness import Claim

#: Rows a second on one H200: of the encoder, and of the whole ranker.
ENCODER_GOAL, RANKER_GOAL = 10e6, 5e6
#: Of a row's norm, from the published form in float64.
PARITY_MAX = 1e-2

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """What a folder's lines say.

    Attributes:
        dry_run: whether they mean nothing.
        lines: by (phase, what): the last one, a measured one before one that was not; in the order of the phases.
        unreadable: lines that a kill cut off.
    """

    dry_run: bool
    lines: Mapping[tuple[str, str], Line]
    unreadable: int

    def of(self, phase: str) -> Iterator[tuple[str, Line]]:
        """Return every number of a phase with its name, measured or not."""
        return ((what, line) for (of, what), line in self.lines.items() if of == phase and what != "the phase")

    def value(self, phase: str, what: str, key: str) -> float | None:
        value = self.lines.get((phase, what), {}).get(key)
        return float(value) if isinstance(value, int | float) else None


def results(found: NumbersFile, *, dry_run: bool) -> Results:
    """Sort lines, and add one for everything that should be there and is not."""
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
    """Return everything in the form that all results of benchmarks have."""
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
    """Compare what was measured with what is required; what was not measured claims nothing."""
    differences = [
        float(line["relative_difference"]) for _, line in found.of("parity") if "relative_difference" in line
    ]
    if differences:
        worst = max(differences, key=lambda one: (math.isnan(one), one))  # NaN before all others: it holds nothing
        yield Claim("largest relative difference of the fused kernel", worst, PARITY_MAX, "", "at_most")
    for phase, goal, name in (("encoder", ENCODER_GOAL, "encoder"), ("engine", RANKER_GOAL, "whole ranker")):
        rates = [
            float(line["rows_s"]) for what, line in found.of(phase) if "rows_s" in line and "published" not in what
        ]
        if rates:
            yield Claim(f"{name}, its best batch", max(rates), goal, "rows/s", "at_least")
