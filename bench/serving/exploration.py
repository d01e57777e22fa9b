"""Time the explorers at 128 candidates, and add up the predicted utility that a share of 1.25% gives up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.harness import Claim, Conclusion, Raw, markdown_table
from bench.test_bed import SEED
from model_store.exploration.explorer import Explored, Explorer
from model_store.exploration.orders import OrderExplorer
from model_store.exploration.regret import TunedOrder
from model_store.exploration.weights import WeightsExplorer
from model_store.model.utility import weighted_sum

#: The limits: processor time of a call for a request that explores, and for one that does not; utility given up.
_EXPLORE_US, _PASS_US, _GIVEN_UP = 100.0, 1.0, 0.001
_ROWS, _TOP_K, _SHARE, _REGRET_MAX, _ARMS = 128, 25, 0.0125, 0.05, 8
_TUNED = np.array([1.0, 0.3, 0.1])


@dataclass(frozen=True, slots=True)
class ExplorationPlan:
    rounds: int = 15
    calls: int = 2_000
    requests: int = 100_000


QUICK = ExplorationPlan(rounds=1, calls=20, requests=2_000)


def measure(*, quick: bool = False) -> Iterator[Raw]:
    plan = QUICK if quick else ExplorationPlan()
    rng = np.random.default_rng(SEED)
    raw: Raw = {"rows": _ROWS, "top_k": _TOP_K, "arms": _ARMS, "share": _SHARE, "us": {}, "given_up": {}}
    for kind, explorer in _explorers().items():
        calls = _calls(explorer, _parties(rng))
        raw["us"][kind] = {name: [] for name in calls}
        for _ in range(plan.rounds):
            for name, call in calls.items():
                raw["us"][kind][name].append(_us(call, plan.calls))
        yield raw
    for kind, explorer in _explorers().items():
        raw["given_up"][kind] = _given_up(explorer, plan.requests, rng)
        yield raw


def conclude(raw: Raw) -> Conclusion:
    medians = {kind: {name: float(np.median(us)) for name, us in timed.items()} for kind, timed in raw["us"].items()}
    claims, rows = [], []
    for kind, us in medians.items():
        found = raw["given_up"][kind]
        given_up = found["regret"] / found["tuned_value"]
        ratios = {
            f"explore, over {_EXPLORE_US:g} us": us["explore"] / _EXPLORE_US,
            f"propensities, over {_EXPLORE_US:g} us": us["propensities"] / _EXPLORE_US,
            f"not exploring, over {_PASS_US:g} us": us["not exploring"] / _PASS_US,
            f"predicted utility given up, over {_GIVEN_UP:.1%}": given_up / _GIVEN_UP,
        }
        claims += [Claim(f"{kind}: {name}", ratio, 1.0, "ratio", "at_most") for name, ratio in ratios.items()]
        rows.append((kind, *(f"{value:.2f}" for value in us.values()), f"{given_up:.4%}", str(found["explored"])))
    header = ("kind", "not exploring, us", "explore, us", "propensities, us", "given up", "explored")
    summary = {f"{kind}, us": us["explore"] for kind, us in medians.items()}
    table = markdown_table(f"At {_ROWS} candidates, {_TOP_K} of them answered", header, rows)
    return Conclusion(summary, tuple(claims), table)


def _explorers() -> dict[str, Explorer]:
    rng = np.random.default_rng(SEED)
    weights = _TUNED * np.exp(rng.normal(0, 0.5, (_ARMS, 3)))
    names = tuple(f"arm{i}" for i in range(_ARMS))
    even = np.full(_ARMS, 1 / _ARMS)
    return {
        "weights": WeightsExplorer(7, _SHARE, _REGRET_MAX, _TUNED, names, weights, even),
        "order": OrderExplorer(7, _SHARE, _REGRET_MAX, _TUNED, best=8, temperature=0.05, floor=0.05),
    }


def _parties(rng: np.random.Generator) -> np.ndarray:
    """Return float64[128, 3], utilities as skewed as those of saves: most are small, and parties agree in part."""
    common = rng.normal(size=(_ROWS, 1))
    utilities: np.ndarray = 1 / (1 + np.exp(2.0 - 0.7 * common - 0.7 * rng.normal(size=(_ROWS, 3))))
    return utilities


def _calls(explorer: Explorer, parties: np.ndarray) -> dict[str, Callable[[], object]]:
    pins = np.arange(1, _ROWS + 1, dtype=np.uint64)
    utilities = weighted_sum(parties, _TUNED)
    exploring = next(number for number in range(1, 100_000) if explorer.explores(number))
    passing = next(number for number in range(1, 100_000) if not explorer.explores(number))
    order = TunedOrder(utilities, _TOP_K, _REGRET_MAX).order
    return {
        "not exploring": partial(explorer.explores, passing),
        "explore": partial(explorer.explore, exploring, pins, parties, utilities, _TOP_K),
        "propensities": partial(explorer.propensities, parties, order),
    }


def _us(call: Callable[[], object], calls: int) -> float:
    """Return the processor time of a call in microseconds."""
    start_s = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start_s) / calls * 1e6


def _given_up(explorer: Explorer, requests: int, rng: np.random.Generator) -> dict[str, float]:
    pins = np.arange(1, _ROWS + 1, dtype=np.uint64)
    regret = tuned_value = 0.0
    explored = 0
    for request_id in range(1, requests + 1):
        parties = _parties(rng)
        utilities = weighted_sum(parties, _TUNED)
        tuned_value += TunedOrder(utilities, _TOP_K, _REGRET_MAX).value
        decision = explorer.explore(request_id, pins, parties, utilities, _TOP_K)
        if isinstance(decision, Explored):
            regret += decision.regret
            explored += 1
    return {"requests": requests, "explored": explored, "regret": regret, "tuned_value": tuned_value}
