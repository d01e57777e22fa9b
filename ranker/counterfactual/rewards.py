"""What logged answers earned, and what the calibrated heads expect any order of their pins to earn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impressions.slates import Slates
from model_store.model.discount import discounts
from model_store.model.expression import Expression, compile_expression
from model_store.model.utility import SurfaceUtility
from ranker.errors import PropensityError

#: So many expected actions of the head at all positions are added to each position's, so that a position with few
#: actions takes the head's own ratio.
_PRIOR_ACTIONS = 5.0
_FOLDS = 2


@dataclass(frozen=True, slots=True)
class Reward:
    """What a shown pin earns: an action (1 or 0), or a party's expression with the actions in place of probabilities.

    Attributes:
        name: of the action or the party.
        expression: over heads and pin attributes.
        discounted: whether positions count by `model_store.model.discount`.
    """

    name: str
    expression: Expression
    discounted: bool = False

    def of(self, heads: np.ndarray, slates: Slates, positions: np.ndarray) -> np.ndarray:
        """Return float64[N] for pins with these actions or probabilities, float[N, H], at these positions, int64[N].

        Raises:
            PropensityError: a value is not finite.
        """
        values = row_values(self.expression, heads, slates)
        wrong = ~np.isfinite(values)
        if wrong.any():
            raise PropensityError(
                f"the reward {self.name} is {values[wrong][0]} for {wrong.sum():,} of {len(wrong):,} pins. With "
                "actions, 0 or 1, in place of probabilities, its expression must be a number: count other rewards "
                "(--reward), or change the expression, such as log1p(save) for log(save)"
            )
        return values * _discounts(positions) if self.discounted else values


def rewards_of(table: SurfaceUtility, slates: Slates, *, discounted: bool = False) -> dict[str, Reward]:
    """Return the rewards of a surface: each party's, in the table's order, then each head's action."""
    named = dict(zip(table.parties, table.expressions, strict=True))
    for head in slates.heads:
        named.setdefault(head, compile_expression(head, {head}))
    return {name: Reward(name, expression, discounted) for name, expression in named.items()}


def row_values(expression: Expression, heads: np.ndarray, slates: Slates) -> np.ndarray:
    """Evaluate an expression over all shown pins, float64[N]."""
    columns = dict(zip(slates.heads, heads.T.astype(np.float64, "C"), strict=True))
    columns |= dict(zip(slates.attributes, slates.attribute_values.T.astype(np.float64, "C"), strict=True))
    values = expression([columns[name] for name in expression.names])
    return np.array(np.broadcast_to(values, len(heads)), np.float64)


def head_labels(slates: Slates) -> np.ndarray:
    """Return bool[N, H], whether the user took each head's action.

    Raises:
        PropensityError: the log has no such action.
    """
    missing = [head for head in slates.heads if head not in slates.actions]
    if missing:
        raise PropensityError(
            f"the joined log has no action {missing[0]}, which {slates.model} predicts; it has "
            f"{', '.join(slates.actions)}"
        )
    return slates.labels[:, [slates.actions.index(head) for head in slates.heads]]


def examination_factors(
    users: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, positions: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate how many of the predicted actions happen at each position, from other users than a row's own.

    Args:
        users: integers[N], the user of each shown pin.
        labels: bool or float[N, H], the actions.
        probabilities: float[N, H], as predicted.
        positions: int64[N].
        seed: seed of the folds of users.

    Returns:
        float64[folds, positions, H], and int64[N], the fold whose factors each row has.
    """
    distinct, user = np.unique(users, return_inverse=True)
    if len(distinct) < _FOLDS:
        raise PropensityError(
            "a reward model needs the answers of at least two users; log more answers, then join again"
        )
    folds = (np.random.default_rng(seed).permutation(len(distinct)) % _FOLDS)[user]
    count = int(positions.max()) + 1
    factors = np.empty((_FOLDS, count, labels.shape[1]))
    predicted = np.isfinite(probabilities).all(axis=1)  # servers answer pins without a score as well, at the end
    for fold in range(_FOLDS):
        others = (folds != fold) & predicted
        for head in range(labels.shape[1]):
            acted = np.bincount(positions[others], labels[others, head], count)
            expected = np.bincount(positions[others], probabilities[others, head], count)
            overall = acted.sum() / max(expected.sum(), np.finfo(np.float64).tiny)
            factors[fold, :, head] = (acted + _PRIOR_ACTIONS * overall) / (expected + _PRIOR_ACTIONS)
    return factors, folds


@dataclass(frozen=True, slots=True)
class RewardModel:
    """The calibrated heads times an examination factor for each head and position.

    Heads are calibrated on the requests that they were trained on; users look at the first positions of an answer more
    often. So the factor of a position is the number of actions there over the number that the heads expect. It is
    estimated without the user's own requests, in two folds of users: what is predicted then does not depend on what
    it is compared with.

    Attributes:
        slates: the answers.
        factors: float64[folds, positions, H].
        folds: int64[N], the fold whose factors each shown pin has.
    """

    slates: Slates
    factors: np.ndarray
    folds: np.ndarray

    @staticmethod
    def of(slates: Slates, seed: int = 7) -> RewardModel:
        """Estimate the factors from the answers."""
        users = np.repeat(slates.user_ids, np.diff(slates.row_splits))
        factors, folds = examination_factors(users, head_labels(slates), slates.probabilities, slates.positions, seed)
        return RewardModel(slates, factors, folds)

    def predicted(self, reward: Reward, positions: np.ndarray) -> np.ndarray:
        """Return float64[N], what each pin is expected to earn at these positions, int64[N].

        Exact for rewards that are linear in the actions; otherwise the reward of the expectation. A pin whose
        probabilities are not finite is expected to get no action.
        """
        probabilities = np.where(np.isfinite(self.slates.probabilities), self.slates.probabilities, 0.0)
        heads = np.clip(probabilities * self.factors[self.folds, positions], 0.0, 1.0)
        return reward.of(heads, self.slates, positions)


def _discounts(positions: np.ndarray) -> np.ndarray:
    weights: np.ndarray = discounts(int(positions.max()) + 1)[positions]
    return weights
