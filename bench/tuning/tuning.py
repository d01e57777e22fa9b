"""Tune three constraints on 2,000 requests of 128 candidates, and compare the weights with other ways to choose them.

The requests are drawn, by a design that was fixed before anything was tuned on it:

- 2,000 users with 4 requests each, of 128 candidates. A quarter of the users is tuned on, the others are held out.
- The logit of each head (save, click, hide) is a constant, plus effects of user, request, pin and pair, all normal.
- Pins have a `tail` (uniform), a merchant (15% of them) and a bid (10% of them, lognormal). Pins of the tail are a
  little worse, and merchants' are saved less and clicked more, so the parties' interests differ.
- Parties' expressions have a square root, a product, a threshold and a bound, as real ones do.

The rivals see the same requests, and count only where they meet the same thetas: a grid that a person may try by hand,
random weights, and Optuna's TPE, which knows the constraints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import optuna

from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.test_bed import SEED, median
from model_store.model.expression import compile_expression
from ranker.tuning.dual import Dual, Optimum
from ranker.tuning.orders import ScoredRequests
from ranker.tuning.results import SHORT_ERRORS_MAX, SHORT_SHARE_MAX, TunedWeights
from ranker.tuning.thetas import parse_thetas
from ranker.tuning.tune import Goal, split_users, tune
from tests.ranker.tuning.randomised_orders import best_mixture

EXPRESSIONS = {
    "pinner": "save + 0.3 * click - 2 * hide",
    "creator": "(save + 0.5 * click) * sqrt(pin.tail)",
    "merchant": "pin.merchant * where(click > 0.1, click, 0)",
    "ad": "minimum(click * pin.bid, 0.3)",
}
IN_FORCE = np.array([1.0, 0.2, 0.2, 0.2])
THETAS = ("creator=+2%", "merchant=+10%", "ad=+5%")
_BY_HAND = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
#: Random weights and TPE's are log-uniform between these.
_LOW, _HIGH = 0.01, 10.0


@dataclass(frozen=True, slots=True)
class TuningPlan:
    users: int = 2_000
    rounds: int = 5
    random: int = 1_000
    trials: int = 200
    instances: int = 20


QUICK = TuningPlan(users=80, rounds=1, random=20, trials=5, instances=2)


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if no orders meet the thetas."""
    plan = QUICK if quick else TuningPlan()
    requests = drawn(plan.users)
    rounds = []
    for _ in range(plan.rounds):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        found = tune(requests, Goal("pinner", parse_thetas(THETAS), IN_FORCE), SEED, 0.75)
        rounds.append({"wall_s": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s})
    if not isinstance(found, TunedWeights):
        raise BenchmarkError(str(found))
    raw: Raw = {"requests": found.requests, "rows": 128, "rounds": rounds, **_tuned(found)}
    yield raw
    chosen = requests.take(split_users(requests.users, 0.75, SEED)[0])
    raw["instances"] = [_instance(number) for number in range(plan.instances)]
    rivals: dict[str, Callable[[], Iterator[np.ndarray]]] = {
        "by hand": _by_hand,
        "random": lambda: _random(plan.random),
        "TPE": lambda: _tpe(chosen, found, plan.trials),
    }
    raw["rivals"] = {}
    for name, weights in rivals.items():
        raw["rivals"][name] = _best(chosen, found, weights())
        yield raw


def conclude(raw: Raw) -> Conclusion:
    pinner = raw["parties"]["pinner"]["after"]
    seconds = [max(r["wall_s"], r["cpu_s"]) for r in raw["rounds"]]
    worst = max(raw["held_out"].values(), key=lambda check: check["short_percent"])
    errors = max(check["short_errors"] for check in raw["held_out"].values())
    off = max(abs(i["dual"] - i["linear_program"]) for i in raw["instances"])
    claims = (
        Claim("seconds to tune, with intervals and fronts, on one core", median(seconds), 20, "s", "at_most"),
        Claim("largest difference of the dual from HiGHS's optimum, 40 x 12", off, 1e-6, "utility", "at_most"),
        Claim("duality gap", raw["gap"], 1e-6, "share", "at_most"),
        Claim("worst held-out shortfall", worst["short_percent"], 100 * SHORT_SHARE_MAX, "% of theta", "at_most"),
        Claim("worst held-out shortfall, in errors", errors, SHORT_ERRORS_MAX, "standard errors", "at_most"),
        *(
            Claim.ratio(
                f"pinner's utility over the best of {rival['tried']} weights {_CHOSEN[name]}",
                pinner, rival["pinner"], 1, "at_least", "none of them meets the thetas",
            )
            for name, rival in raw["rivals"].items()
        ),
    )  # fmt: skip
    summary: dict[str, float | None] = {
        "seconds to tune": median(seconds),
        "pinner's utility per request": pinner,
        "pinner's utility per request, by the weights in force": raw["parties"]["pinner"]["before"],
        "lost to one order per request, share": raw["lost_to_one_order"],
        **{f"{name}: share that meets the thetas": r["feasible"] / r["tried"] for name, r in raw["rivals"].items()},
    }
    return Conclusion(summary, claims)


_CHOSEN = {"by hand": "by hand", "random": "at random", "TPE": "by TPE"}


def drawn(users: int) -> ScoredRequests:
    """Draw 4 requests for each user, by the design above."""
    rng = np.random.default_rng([SEED, users])
    requests, rows = 4 * users, 4 * users * 128
    tail, merchant, bidding = rng.random(rows), rng.random(rows) < 0.15, rng.random(rows) < 0.1
    columns = {
        "pin.tail": tail,
        "pin.merchant": merchant.astype(np.float64),
        "pin.bid": bidding * rng.lognormal(-0.5, 0.7, rows),
    }
    quality = rng.normal(0, 0.7, rows) - 0.8 * tail
    heads = {"save": (-2.5, 1.0, -0.5), "click": (-1.5, 0.8, 0.5), "hide": (-4.5, -0.8, 0.3)}
    for head, (constant, of_quality, of_merchant) in heads.items():
        user, request = rng.normal(0, 0.5, users), rng.normal(0, 0.3, requests)
        logit = constant + np.repeat(np.repeat(user, 4) + request, 128) + of_quality * quality + of_merchant * merchant
        columns[head] = 1 / (1 + np.exp(-(logit + rng.normal(0, 0.8, rows))))
    compiled = [compile_expression(source, set(columns)) for source in EXPRESSIONS.values()]
    utilities = np.column_stack([e([columns[name] for name in e.names]) for e in compiled])
    splits = np.arange(requests + 1) * 128
    return ScoredRequests(tuple(EXPRESSIONS), np.repeat(np.arange(users), 4), splits, utilities)


def _tuned(found: TunedWeights) -> Raw:
    return {
        "gap": found.gap,
        "lost_to_one_order": found.lost_to_one_order,
        "met": found.met,
        "orders": found.orders,
        "parties": {
            one.party: {
                "weight": one.weight_after, "before": one.before.value, "after": one.after.value, "theta": one.theta,
                "exchange_rate": one.multiplier,
            }
            for one in found.parties
        },
        "held_out": {
            one.party: {
                "theta": one.theta,
                "value": one.value,
                "short_percent": 100 * one.shortfall / one.theta,
                "short_errors": one.shortfall / one.standard_error,
            }
            for one in found.held_out
        },
    }  # fmt: skip


def _instance(number: int) -> dict[str, float]:
    """Solve a random instance of 40 requests with 12 candidates by the dual and by a linear program."""
    rng = np.random.default_rng([SEED, number])
    requests = ScoredRequests(
        tuple(EXPRESSIONS), np.arange(40), np.arange(41) * 12, rng.normal(size=(480, 4)) * [1, 3, 0.3, 1]
    )
    dual = Dual(requests.best, 3)
    free = requests.best(np.eye(4)[0])[1:]
    thetas = free + rng.uniform(0.05, 0.3, 3) * (dual.most - free)
    found = dual.solve(thetas)
    if not isinstance(found, Optimum):
        raise BenchmarkError(f"instance {number} cannot be solved")
    return {"dual": found.bound, "linear_program": best_mixture(requests, np.eye(4)[0], np.eye(4)[1:], thetas)}


def _best(requests: ScoredRequests, found: TunedWeights, candidates: Iterator[np.ndarray]) -> Raw:
    """Return the most that the pinner gets by any of these weights that meet the thetas; null if none does."""
    tried, met = 0, []
    for weights in candidates:
        values = requests.served(weights).mean(axis=0)
        tried += 1
        if (values[1:] >= list(found.thetas.values())).all():
            met.append(float(values[0]))
    return {"tried": tried, "feasible": len(met), "pinner": max(met, default=None)}


def _by_hand() -> Iterator[np.ndarray]:
    for creator in _BY_HAND:
        for merchant in _BY_HAND:
            for ad in _BY_HAND:
                yield np.array([1.0, creator, merchant, ad])


def _random(count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(SEED)
    for _ in range(count):
        yield np.concatenate([[1.0], np.exp(rng.uniform(np.log(_LOW), np.log(_HIGH), 3))])


def _tpe(requests: ScoredRequests, found: TunedWeights, trials: int) -> Iterator[np.ndarray]:
    """Yield the weights that TPE tries; it maximises the pinner's value and knows by how much thetas are missed."""
    logging.getLogger("optuna").setLevel(logging.WARNING)
    tried: list[np.ndarray] = []

    def objective(trial: optuna.Trial) -> float:
        chosen = [trial.suggest_float(party, _LOW, _HIGH, log=True) for party in found.thetas]
        tried.append(np.array([1.0, *chosen]))
        values = requests.served(tried[-1]).mean(axis=0)
        for (party, theta), value in zip(found.thetas.items(), values[1:], strict=True):
            trial.set_constraint(party, float((theta - value) / theta))
        return float(values[0])

    sampler = optuna.samplers.TPESampler(seed=SEED)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, n_trials=trials)
    yield from tried
