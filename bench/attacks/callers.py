"""Measure what callers with names, tokens and quotas cost: CPU time of a Rank call with a callers file, and without.

Two servers differ only in the file, which names 50 callers with quotas that are never reached. Their calls come with
the 50 tokens in turn. The servers are saturated one after the other, by turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.attacks.clients import Load, outcome, results_of, saturate
from bench.attacks.place import Place, callers_file, place, token_of
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.processes import ServerProcess
from bench.test_bed import CONFIG, known_median, known_ratio
from loadtest.open_loop import OK

_CALLERS = tuple(f"caller-{i}" for i in range(50))
_RIGHTS = 'may = ["rank"]\nrequests_per_s = 1e6\nrows_per_s = 1e9\n'
_CANDIDATES, _IN_FLIGHT, _DEADLINE_S = 128, 8, 10.0


@dataclass(frozen=True, slots=True)
class CallersPlan:
    rounds: int = 10
    warmup_s: float = 1.0
    step_s: float = 5.0


QUICK = CallersPlan(rounds=1, warmup_s=0.2, step_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start, or does not answer a call completely."""
    plan = QUICK if quick else CallersPlan()
    with place(config) as ground:
        named = {"callers_file": callers_file(ground.folder / "callers.toml", _CALLERS, _RIGHTS)}
        with ground.server("named", named) as with_names, ground.server("unnamed") as without:
            servers = {"with": (with_names, tuple(map(token_of, _CALLERS))), "without": (without, ())}
            rounds: list[dict[str, Any]] = []
            for number in range(plan.rounds):
                order = list(servers) if number % 2 else list(reversed(servers))
                rounds.append({name: _step(plan, ground, *servers[name]) for name in order})
                yield {"callers": len(_CALLERS), "rounds": rounds}


def _step(plan: CallersPlan, ground: Place, server: ServerProcess, tokens: tuple[str, ...]) -> dict[str, Any]:
    load = Load(server.address, ground.requests(_CANDIDATES), _DEADLINE_S, np.empty(0))
    job = partial(saturate, load, _IN_FLIGHT, tokens, plan.warmup_s, plan.step_s, server.pid)
    ((samples, cpu_s),) = results_of(job)
    found = outcome(samples, _DEADLINE_S)
    if set(found["statuses"]) != {OK} or found["degraded"]:
        raise BenchmarkError(f"expected full answers only: {found['statuses']}, {found['degraded']} degraded")
    return {**found, "per_s": found["good"] / plan.step_s, "cpu_s": cpu_s}


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    core_ms = {
        which: [r[which]["cpu_s"] / r[which]["good"] * 1e3 if r[which]["good"] else None for r in rounds]
        for which in ("with", "without")
    }
    claims = (
        Claim(
            f"CPU time of a call with {raw['callers']} named callers, over without",
            known_ratio(core_ms["with"], core_ms["without"]), 1.02, "ratio", "at_most", "a round answered nothing",
        ),
    )  # fmt: skip
    summary = {
        f"{which} a callers file, {what}": value
        for which in ("with", "without")
        for what, value in (
            ("core-ms a call", known_median(core_ms[which])),
            ("calls/s", known_median([r[which]["per_s"] for r in rounds])),
        )
    }
    return Conclusion(summary, claims)
