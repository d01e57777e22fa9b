"""Ratings that users chose, and ratings of randomly drawn coats: does weighting repair what self-selection distorts?

Coat (Schnabel, Swaminathan, Singh, Chandak and Joachims, 2016): 290 users rated 24 coats of their own choice and 16
drawn at random, out of 300. The propensities of the choice come with the data. The data may not be passed on: put it
into data/coat, or name its folder in the environment variable COAT_DATA.

- The mean rating, with the random ratings as the truth: of the chosen ratings as they are, by inverse propensities, and
  doubly robust. The reward model is additive, a user's and a coat's effect, and learned from the chosen ratings as they
  are, each rating's prediction without the rating's own fold.
- A ranker: matrix factorisation by alternating least squares, with and without the weights. Rank and regularisation of
  each one are chosen by cross-validation on the chosen ratings, by each one's own loss. Judged on the random ratings by
  the squared error (as in the paper), and by the share of a user's pairs that are ordered right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np

from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from ranker.counterfactual.estimators import ESTIMATORS, LoggedActions
from ranker.evaluation.bootstrap import resample

FOLDS, SEED, ROUNDS, STARTS = 5, 7, 12, 5
RANKS, RIDGES = (2, 5, 10, 20), (2.0, 5.0, 10.0, 20.0)
ADDITIVE = (0, 5.0)


class Ratings:
    """Chosen and random ratings with propensities: users, coats, values and weights of each."""

    def __init__(self, folder: Path) -> None:
        """Read the folder. Raises BenchmarkError if it is not the data."""
        try:
            chosen, drawn = np.loadtxt(folder / "train.ascii"), np.loadtxt(folder / "test.ascii")
            propensities = np.loadtxt(folder / "propensities.ascii")
        except OSError as error:
            raise BenchmarkError(f"{error}; put Coat into data/coat, or name its folder in COAT_DATA") from error
        self.shape = chosen.shape
        self.users, self.coats = np.nonzero(chosen)
        self.values = chosen[self.users, self.coats]
        self.propensities = propensities[self.users, self.coats]
        self.test_users, self.test_coats = np.nonzero(drawn)
        self.test_values = drawn[self.test_users, self.test_coats]


def factorised(data: Ratings, rows: np.ndarray, weights: np.ndarray, rank: int, ridge: float) -> np.ndarray:
    """Fit weighted ratings by a mean, effects of users and coats, and `rank` factors; return float64[users, coats].

    The mean of several fits from random starts: which optimum a single one finds is chance.
    """
    weights = weights / weights.mean()
    mean = float((weights * data.values[rows]).sum() / weights.sum())
    target, weight = np.zeros(data.shape), np.zeros(data.shape)
    place = data.users[rows], data.coats[rows]
    target[place], weight[place] = data.values[rows] - mean, weights
    rng = np.random.default_rng(SEED)
    fits = []
    for _ in range(STARTS if rank else 1):
        # Column 0 holds the users' effects and column 1 the coats'; the other side's column is 1.
        user, coat = (np.hstack([np.zeros((n, 2)), rng.normal(0, 0.1, (n, rank))]) for n in data.shape)
        user[:, 1], coat[:, 0] = 1, 1
        for _ in range(ROUNDS):
            _solve(user, coat, target, weight, ridge, fixed=1)
            _solve(coat, user, target.T, weight.T, ridge, fixed=0)
        fits.append(mean + user @ coat.T)
    found: np.ndarray = np.mean(fits, axis=0)
    return found


def _solve(
    own: np.ndarray, other: np.ndarray, target: np.ndarray, weight: np.ndarray, ridge: float, fixed: int
) -> None:
    free = [column for column in range(own.shape[1]) if column != fixed]
    known = other[:, free]
    rest = target - np.outer(own[:, fixed], other[:, fixed])
    products = (known[:, :, None] * known[:, None, :]).reshape(len(known), -1)
    left = (weight @ products).reshape(-1, len(free), len(free)) + ridge * np.eye(len(free))
    right = (weight * rest) @ known
    own[:, free] = np.linalg.solve(left, right[:, :, None])[:, :, 0]


def measure(*, quick: bool = False) -> Iterator[Raw]:
    """Estimate the mean, then choose, fit and compare the rankers."""
    data = Ratings(Path(os.environ.get("COAT_DATA", "data/coat")))
    raw: Raw = {"mean": _means(data)}
    yield raw
    ones, inverse = np.ones(len(data.values)), 1 / data.propensities
    raw["rankers"] = {}
    scores, errors = {}, {}
    for name, weights in (("naive", ones), ("ips", inverse)):
        grid = list(product(RANKS, RIDGES))[: 2 if quick else None]
        losses = [_validated(data, weights, rank, ridge) for rank, ridge in grid]
        rank, ridge = grid[int(np.argmin(losses))]
        fitted = factorised(data, np.arange(len(ones)), weights, rank, ridge)[data.test_users, data.test_coats]
        scores[name] = _ordered_right(data, fitted)
        squares = np.bincount(data.test_users, (fitted - data.test_values) ** 2, data.shape[0])
        errors[name] = squares / np.bincount(data.test_users, minlength=data.shape[0])
        raw["rankers"][name] = {
            "rank": rank,
            "ridge": ridge,
            "validation_losses": losses,
            "pairs_ordered_right": float(np.nanmean(scores[name])),
            "squared_error": float(errors[name].mean()),
        }
        yield raw
    raw["gain"] = {
        "squared_error": _gain(errors["naive"] - errors["ips"]),
        "pairs_ordered_right": _gain(scores["ips"] - scores["naive"]),
    }
    yield raw


def conclude(raw: Raw) -> Conclusion:
    mean, rankers = raw["mean"], raw["rankers"]
    bias = {name: abs(value - mean["random"]) for name, value in mean.items()}
    cut = {name: 1 - bias[name] / bias["chosen"] for name in ("snips", "dr", "sndr")}
    summary: dict[str, float | None] = {f"mean rating, {name}": value for name, value in mean.items()}
    for name, ranker in rankers.items():
        summary[f"pairs ordered right, {name}"] = ranker["pairs_ordered_right"]
        summary[f"mean squared error, {name}"] = ranker["squared_error"]
    gain = raw["gain"]
    summary["gain of ips in squared error"] = gain["squared_error"]["value"]
    summary["gain of ips in pairs ordered right"] = gain["pairs_ordered_right"]["value"]
    claims = (
        Claim("Bias of the mean rating that self-normalised ips removes", cut["snips"], 0.7, "share", "at_least"),
        Claim("Bias that dr removes, less what ips removes", cut["dr"] - cut["snips"], 0.0, "share", "at_least"),
        Claim("Low end of ips' gain in squared error", gain["squared_error"]["low"], 0.0, "stars^2", "at_least"),
        Claim(
            "Low end of ips' gain in pairs ordered right", gain["pairs_ordered_right"]["low"], 0.0, "share", "at_least"
        ),
    )
    return Conclusion(summary, claims)


def _gain(gained: np.ndarray) -> dict[str, float | None]:
    """Return the mean over users with its interval; users without a value are left out."""
    gained = gained[~np.isnan(gained)]
    drawn = resample(np.arange(len(gained)), np.column_stack([gained, np.ones(len(gained))]), 4_000, SEED)
    return asdict((drawn[0] / drawn[1]).estimate())


def _means(data: Ratings) -> dict[str, float]:
    """Estimate the mean over all users and coats; each was chosen with its propensity, so N is their number."""
    cells = data.shape[0] * data.shape[1]
    fold = _folds(data)
    predicted, expected = np.empty(len(fold)), 0.0
    for number in range(FOLDS):
        rows = np.nonzero(fold != number)[0]
        fitted = factorised(data, rows, np.ones(len(rows)), *ADDITIVE)
        predicted[fold == number] = fitted[data.users, data.coats][fold == number]
        expected += float(fitted.mean()) / FOLDS
    # Every cell was a chance to choose. The estimators see the cells that were chosen, at the rate of choice, so that
    # weights have a mean of 1.
    rate, n = len(data.values) / cells, len(data.values)
    logged = data.propensities / max(float(data.propensities.max()), rate)
    scale = rate / max(float(data.propensities.max()), rate)
    actions = LoggedActions(
        data.values, logged, np.full(n, scale), data.users, np.arange(n), predicted, np.full(n, expected)
    )
    found = {name: ESTIMATORS[name].terms(actions, 1e9).value() for name in ("ips", "snips", "dm", "dr", "sndr")}
    return {"chosen": float(data.values.mean()), "random": float(data.test_values.mean()), **found}


def _validated(data: Ratings, weights: np.ndarray, rank: int, ridge: float) -> float:
    fold, predicted = _folds(data), np.empty(len(weights))
    for number in range(FOLDS):
        rows = np.nonzero(fold != number)[0]
        fitted = factorised(data, rows, weights[rows], rank, ridge)[data.users, data.coats]
        predicted[fold == number] = fitted[fold == number]
    return float((weights * (data.values - predicted) ** 2).sum() / weights.sum())


def _folds(data: Ratings) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(len(data.values)) % FOLDS


def _ordered_right(data: Ratings, scores: np.ndarray) -> np.ndarray:
    """Return float64[users], the share of pairs of unequal random ratings in the right order; NaN without a pair."""
    found = np.full(data.shape[0], np.nan)
    for user in range(data.shape[0]):
        own = data.test_users == user
        apart = np.sign(np.subtract.outer(data.test_values[own], data.test_values[own]))
        if apart.any():
            right = apart * np.sign(np.subtract.outer(scores[own], scores[own]))
            found[user] = (right[apart != 0].mean() + 1) / 2
    return found
