"""A world with known truth: what is a policy's 95% interval worth, and how much better is the reward model's help?

The world was fixed before any estimator was judged in it:

- Users differ: each has a taste of 4 dimensions and a level of activity of their own, and 1 to 12 requests (1 plus a
  geometric number, 4 on average), so that the requests of a user resemble each other.
- A request has 10 pins with random vectors; a third of them comes from small creators. A user saves or hides a pin,
  or looks at it closely, with a probability that follows from taste and vector, and only if the user examines its
  position. Position k is examined with probability (k + 1) ** -0.5.
- The heads are mildly wrong: their logits have an error per user and one per pin, they think that pins of small
  creators are saved 20% too rarely, and they do not know about positions at all.
- Logging orders by tuned weights in half of the requests. The other half is explored evenly by 8 arms with other
  weights of the creator. So much exploration keeps the simulated logs short: certainty depends on the number of
  explored requests, not on their share.
- The evaluated policy is one of the arms. What it truly earns is the mean of exact expectations over 2,000,000 requests
  of fresh users.

Each log has 500 users. A log is estimated as `pinrank explore evaluate` does it, reward model and its examination
factors included.

With 500 logs, the coverage of a perfect interval has a standard error of 1%, so five sets of 500 are judged. The first
1,000 seeds are not: intervals were chosen on others and seen on those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.harness import BenchmarkError, Claim, Conclusion, Raw, markdown_table
from impressions.slates import Slates
from model_store.model.utility import SurfaceUtility, load_surface, weighted_sum
from ranker.counterfactual.evaluate import UNITS, evaluate_policy
from ranker.counterfactual.policies import logging_policy, utility_policy
from ranker.counterfactual.rewards import rewards_of
from ranker.counterfactual.settings import ESTIMATOR_KINDS, Settings
from ranker.evaluation.bootstrap import Estimate

HEADS = ("save", "closeup", "hide")
ATTRIBUTES = ("pin.tail",)
PINS, TASTES, USERS, LOGS, SETS = 10, 4, 500, 500, 5
FIRST_SEED = 1_000
SHARE = 0.5
ARMS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0)  # weights of the creator; the tuned one is 0.2
EVALUATED = 4
SEED = 2022
_TRUTH_REQUESTS = 2_000_000
_TRUTH_STEP = 200_000
_TABLE = """
[surfaces.home]
weights = {{ pinner = 1.0, creator = {creator} }}
[surfaces.home.utilities]
pinner = "save + 0.5 * closeup - hide"
creator = "save * pin.tail"
"""
_JUDGED = ("pinner", "creator", "save")


@dataclass(frozen=True, slots=True)
class World:
    """R requests of 10 pins each, before they are ordered.

    Attributes:
        users: int64[R].
        probabilities: float32[R, 10, 3], as the heads predict them.
        truth: float64[R, 10, 3], of a pin whose position is examined.
        tails: float64[R, 10], 1 for pins of small creators.
    """

    users: np.ndarray
    probabilities: np.ndarray
    truth: np.ndarray
    tails: np.ndarray


def table(creator: float) -> SurfaceUtility:
    """Return the utility table with a weight of the creator."""
    return load_surface(_TABLE.format(creator=creator).encode(), "home", {*HEADS, *ATTRIBUTES})


def examination() -> np.ndarray:
    """Return float64[10], the probability that a position is examined."""
    found: np.ndarray = (np.arange(PINS) + 1.0) ** -0.5
    return found


def world(rng: np.random.Generator, users: int) -> World:
    """Draw users and their requests."""
    user = np.repeat(np.arange(users), np.minimum(1 + rng.geometric(0.25, users), 12))
    taste, activity = rng.normal(size=(users, TASTES)), rng.normal(0, 0.5, users)
    user_error = rng.normal(0, 0.3, (users, len(HEADS)))
    vectors = rng.normal(size=(len(user), PINS, TASTES)) / np.sqrt(TASTES)
    tails = (rng.random((len(user), PINS)) < 1 / 3).astype(np.float64)
    match = np.einsum("rt,rpt->rp", taste[user], vectors)
    level = np.stack([-0.8 + 1.2 * match, 0.2 + 0.8 * match, -2.5 - 0.8 * match], axis=-1)
    level += activity[user, None, None]
    error = user_error[user][:, None] + rng.normal(0, 0.3, level.shape)
    predicted = _sigmoid(level + error)
    predicted[:, :, 0] *= 1 - 0.2 * tails
    return World(user, predicted.astype(np.float32), _sigmoid(level), tails)


def logged(seed: int, users: int = USERS) -> Slates:
    """Let users act on answers of the logging policy."""
    rng = np.random.default_rng([SEED, seed])
    drawn = world(rng, users)
    requests = np.arange(len(drawn.users))
    orders = np.stack([_order(drawn, creator) for creator in (0.2, *ARMS)])  # [arms + 1, R, 10]
    chances = np.array([1 - SHARE, *[SHARE / len(ARMS)] * len(ARMS)])
    arm = rng.choice(len(chances), size=len(requests), p=chances)
    order = orders[arm, requests]
    same = orders == order
    acts = rng.random((len(requests), PINS, 1)) < examination()[:, None]
    labels = acts & (rng.random((len(requests), PINS, len(HEADS))) < _taken(drawn.truth, order))
    probabilities = _taken(drawn.probabilities, order).reshape(-1, len(HEADS))
    tails = np.take_along_axis(drawn.tails, order, axis=1).reshape(-1, 1)
    parties = _parties(drawn)[requests[:, None], order].reshape(-1, 2)
    weights = np.column_stack([np.ones(len(requests)), np.array([0.2, *ARMS])[arm]])
    return Slates(
        surface="home",
        model="simulated@1",
        utility_digest="",
        heads=HEADS,
        parties=("pinner", "creator"),
        attributes=ATTRIBUTES,
        actions=HEADS,
        request_ids=(requests + 1).astype(np.uint64),
        user_ids=drawn.users.astype(np.uint64),
        time_ms=requests * 60_000,
        arms=np.array(["", *(f"creator-{creator}" for creator in ARMS)])[arm],
        party_weights=weights,
        order_propensities=np.einsum("a,ar->r", chances, same.all(axis=2)),
        candidates=np.full(len(requests), PINS),
        row_splits=np.arange(len(requests) + 1) * PINS,
        pin_ids=np.arange(len(requests) * PINS, dtype=np.uint64),
        places=order.ravel().astype(np.uint32),
        probabilities=probabilities,
        party_utilities=parties,
        attribute_values=tails,
        utilities=(parties * np.repeat(weights, PINS, axis=0)).sum(axis=1).astype(np.float32),
        propensities=np.einsum("a,arp->rp", chances, same).ravel(),
        labels=labels.reshape(-1, len(HEADS)),
        seen=np.ones(len(requests) * PINS, bool),
    )


def truth(creator: float, requests: int = _TRUTH_REQUESTS) -> dict[str, float]:
    """Return the mean of the exact expectations of each reward per request, over fresh users."""
    earned: dict[str, list[np.ndarray]] = {name: [] for name in _JUDGED}
    for step in range(0, requests, _TRUTH_STEP):
        drawn = world(np.random.default_rng([SEED, 10**9 + step]), min(_TRUTH_STEP, requests - step) // 5)
        order = _order(drawn, creator)
        acted = _taken(drawn.truth, order) * examination()[:, None]
        tails = np.take_along_axis(drawn.tails, order, axis=1)
        save, closeup, hide = np.moveaxis(acted, 2, 0)
        per_pin = {"pinner": save + 0.5 * closeup - hide, "creator": save * tails, "save": save}
        for name, values in earned.items():
            values.append(per_pin[name].sum(axis=1))
    return {name: float(np.concatenate(values).mean()) for name, values in earned.items()}


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Estimate log after log."""
    true = truth(ARMS[EVALUATED], 2_000 if quick else _TRUTH_REQUESTS)
    raw: Raw = {"truth": true, "effective_users": [], "sums": {}}
    settings = Settings(resamples=100 if quick else 1_000)
    evaluated = table(ARMS[EVALUATED])
    for log in range(3 if quick else LOGS * SETS):
        slates = logged(FIRST_SEED + log)
        rewards = {name: reward for name, reward in rewards_of(evaluated, slates).items() if name in _JUDGED}
        policy = utility_policy("arm", evaluated, slates)
        found = evaluate_policy(slates, policy, logging_policy(slates), rewards, settings)
        raw["effective_users"].append(round(found.unit("orders").overlap.effective_users, 1))
        for unit in UNITS:
            for name in _JUDGED if found.unit(unit).refused is None else ():
                for estimator in ESTIMATOR_KINDS:
                    estimate = found.forecast(unit, name, estimator).value
                    count(raw, f"{unit} {name} {estimator}", log // LOGS, estimate)
        if log % 10 == 9 or quick:
            yield raw


def conclude(raw: Raw) -> Conclusion:
    rows, scores = [], {}
    for unit in UNITS:
        for name in _JUDGED:
            for estimator in ESTIMATOR_KINDS:
                found = _score(raw, f"{unit} {name} {estimator}")
                if found is None:
                    continue
                scores[unit, name, estimator] = found
                rows.append([f"{unit}, {name}, {estimator}", *(f"{number:.4f}" for number in found)])
    summary: dict[str, float | None] = {f"truth, {name}": value for name, value in raw["truth"].items()}
    effective = raw["effective_users"]
    summary["logs"] = len(effective)
    summary["effective users of whole orders, median"] = float(np.median(effective))
    unbiased = [found[2] for (_, _, estimator), found in scores.items() if estimator in ("ips", "snips", "dr", "sndr")]
    summary["coverage, mean of all rewards, units, and estimators without a known bias"] = (
        float(np.mean(unbiased)) if unbiased else None
    )
    claims = []
    for estimator in ("dr", "ips"):
        covered = scores.get(("orders", "pinner", estimator))
        summary[f"coverage, {estimator}"] = None if covered is None else covered[2]
        for number, sums in enumerate(raw["sums"].get(f"orders pinner {estimator}", []), start=1):
            summary[f"coverage, {estimator}, set {number}"] = sums[3] / sums[0] if sums[0] else None
        for target, direction in ((0.93, "at_least"), (0.97, "at_most")):
            claims.append(
                Claim(
                    f"Share of the logs whose 95% interval covers the truth, {estimator}",
                    None if covered is None else covered[2],
                    target,
                    "share",
                    direction,  # type: ignore[arg-type]
                )
            )
    robust, plain = scores.get(("orders", "pinner", "dr")), scores.get(("orders", "pinner", "ips"))
    claims.append(
        Claim.ratio(
            "Root mean squared error of dr over ips",
            None if robust is None else robust[1],
            None if plain is None else plain[1],
            0.7,
            "at_most",
        )
    )
    header = ("unit, reward, estimator", "bias", "RMSE", "coverage", "mean width of the interval")
    return Conclusion(summary, tuple(claims), markdown_table("Estimates in a world with known truth", header, rows))


def count(raw: Raw, key: str, number: int, estimate: Estimate) -> None:
    """Add an estimate to the sums of its set: of logs, errors, their squares, covered truths, and intervals' widths."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        raise BenchmarkError(f"{key} has no interval, although the log was not refused")
    true = raw["truth"][key.split()[1]]
    error, covered = estimate.value - true, estimate.low <= true <= estimate.high
    sets = raw["sums"].setdefault(key, [])
    sets += [[0.0] * 5 for _ in range(len(sets), number + 1)]
    for place, term in enumerate((1.0, error, error**2, covered, estimate.high - estimate.low)):
        sets[number][place] += term


def _score(raw: Raw, key: str) -> tuple[float, float, float, float] | None:
    """Return bias, RMSE, coverage and width over the logs that were not refused."""
    if key not in raw["sums"]:
        return None
    logs, error, square, covered, width = np.sum(raw["sums"][key], axis=0).tolist()
    return error / logs, float(np.sqrt(square / logs)), covered / logs, width / logs


def _order(drawn: World, creator: float) -> np.ndarray:
    """Return int64[R, 10], the pins best first by a weight of the creator."""
    parties = _parties(drawn).reshape(-1, 2)
    utilities = weighted_sum(parties, np.array([1.0, creator])).reshape(-1, PINS)
    return np.argsort(-utilities, axis=1, kind="stable")


def _parties(drawn: World) -> np.ndarray:
    save, closeup, hide = np.moveaxis(drawn.probabilities.astype(np.float64), 2, 0)
    return np.stack([save + 0.5 * closeup - hide, save * drawn.tails], axis=-1)


def _taken(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, order[:, :, None], axis=1)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-logits))
    return found
