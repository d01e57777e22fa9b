"""Put a greedy caller beside ten modest ones on one surface: named by tokens, and known only by their connections.

The greedy one always has 12 calls of 5,000 candidates in flight, with deadlines of 30 s, and waits 100 ms after a
refusal. Each modest one makes 5 calls of 100 candidates a second, with deadlines of 100 ms. All have a connection of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.attacks.clients import Load, Saturation, offer, outcome, results_of, saturate, steady
from bench.attacks.place import Place, callers_file, place, token_of
from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess
from bench.test_bed import CONFIG, known_median

_GREEDY = "greedy"
_MODEST = tuple(f"modest-{i}" for i in range(10))
_CALLS, _LARGE, _PATIENT_S = 12, 5_000, 30.0
_PER_S, _SMALL, _DEADLINE_S = 5.0, 100, 0.1
_STEPS = {"modest": (True, False), "both": (True, True), "greedy": (False, True)}
_NONE = "no call of a modest caller was answered in time without the greedy one"


@dataclass(frozen=True, slots=True)
class GreedyPlan:
    rounds: int = 6
    #: Before modest callers are counted, and for the greedy one to fill the server.
    warmup_s: float = 3.0
    step_s: float = 10.0


QUICK = GreedyPlan(rounds=1, warmup_s=0.3, step_s=1.0)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start."""
    plan = QUICK if quick else GreedyPlan()
    with place(config) as ground:
        named = {"callers_file": callers_file(ground.folder / "callers.toml", (_GREEDY, *_MODEST))}
        with ground.server("named", named) as by_token, ground.server("unnamed") as by_connection:
            rounds: list[dict[str, Any]] = []
            for _ in range(plan.rounds):
                rounds.append({
                    "tokens": _round(plan, ground, by_token, token_of),
                    "connections": _round(plan, ground, by_connection, lambda _: ""),
                })  # fmt: skip
                yield {"rounds": rounds, "step_s": plan.step_s}


def _round(plan: GreedyPlan, ground: Place, server: ServerProcess, token: Any) -> dict[str, Any]:
    due_s = [steady(_PER_S, plan.warmup_s + plan.step_s, i / len(_MODEST)) for i in range(len(_MODEST))]
    small, large = ground.requests(_SMALL), ground.requests(_LARGE, 16)
    loads = tuple(
        Load(server.address, small, _DEADLINE_S, due, token(name)) for name, due in zip(_MODEST, due_s, strict=True)
    )
    hungry = Saturation(Load(server.address, large, _PATIENT_S, np.empty(0), token(_GREEDY)), server.pid, _CALLS)
    jobs: dict[str, Callable[[], Any]] = {
        "modest": partial(offer, loads),
        "greedy": partial(saturate, (hungry,), plan.warmup_s, plan.step_s),
    }
    found: dict[str, Any] = {}
    for step, (modest, greedy) in _STEPS.items():
        chosen = [name for name, there in (("modest", modest), ("greedy", greedy)) if there]
        results = dict(zip(chosen, results_of(*(jobs[name] for name in chosen)), strict=True))
        found[step] = {
            "modest": [outcome(one.since(plan.warmup_s), _DEADLINE_S) for one in results.get("modest", ())],
            "greedy": outcome(results["greedy"][0][0], _PATIENT_S) if greedy else None,
        }
    return found


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]

    def good(known_by: str, step: str, caller: int) -> int:
        return sum(int(r[known_by][step]["modest"][caller]["good"]) for r in rounds)

    def kept(known_by: str) -> float | None:
        """Return the goodput that the worst modest caller keeps beside the greedy one."""
        callers = range(len(rounds[0][known_by]["both"]["modest"]))
        alone = [good(known_by, "modest", i) for i in callers]
        return min(good(known_by, "both", i) / alone[i] for i in callers) if all(alone) else None

    claims = tuple(
        Claim(
            f"goodput of the worst modest caller beside a greedy one, over alone, known by {known_by}",
            kept(known_by), 0.95, "ratio", "at_least", _NONE,
        )
        for known_by in ("tokens", "connections")
    )  # fmt: skip
    summary: dict[str, float | None] = {}
    for known_by in ("tokens", "connections"):
        for step, what in (("greedy", "alone"), ("both", "beside modest ones")):
            per_s = [r[known_by][step]["greedy"]["good"] / raw["step_s"] for r in rounds]
            summary[f"known by {known_by}, greedy {what}, rows/s"] = median_rows(per_s)
        for step, what in (("modest", "alone"), ("both", "beside")):
            every = [one for r in rounds for one in r[known_by][step]["modest"]]
            offered = sum(one["offered"] for one in every)
            summary[f"known by {known_by}, modest {what}, good share"] = sum(one["good"] for one in every) / offered
            summary[f"known by {known_by}, modest {what}, P99 ms"] = known_median([one["p99_ms"] for one in every])
    return Conclusion(summary, claims)


def median_rows(calls_per_s: list[float]) -> float:
    return float(np.median(calls_per_s)) * _LARGE
