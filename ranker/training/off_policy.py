"""Weights that make answers of one policy teach what is true under any: `pinrank train --off-policy`.

A log shows what its own policy chose. A pin that it rarely puts at a position is rarely seen there, and pins further
down get fewer actions because fewer users look that far. So each row counts by its clipped inverse propensity, as
explored rows then stand for those that the policy never tried (A. Strehl, J. Langford, L. Li and S. Kakade, "Learning
from logged implicit exploration data", 2010). An action counts by the inverse of the chance that its position is looked
at (T. Joachims, A. Swaminathan and T. Schnabel, "Unbiased learning-to-rank with biased feedback", 2017), which is
taken as `model_store.model.discount`, as tuning does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model_store.model.discount import discounts
from ranker.errors import SettingError
from ranker.training.examples import Examples


@dataclass(frozen=True, slots=True)
class OffPolicyWeights:
    """The weights of one training.

    Attributes:
        clip: the largest inverse propensity, and the largest inverse chance of being looked at.
        mean: the mean of the clipped inverse propensities of all training rows, by which they are divided, so that the
            loss keeps its scale.
    """

    clip: float
    mean: float

    @staticmethod
    def of(examples: Examples, clip: float) -> OffPolicyWeights:
        """Scale the weights to the training examples.

        Raises:
            SettingError: the examples have no propensities; one is no probability; or their log explored nothing.
        """
        if len(examples.propensities) != len(examples.labels):
            raise SettingError("--off-policy needs the propensities of answered requests; add --impressions DIR")
        wrong = ~((examples.propensities > 0) & (examples.propensities <= 1))
        if wrong.any():
            raise SettingError(
                f"--off-policy: {wrong.sum():,} of {len(wrong):,} propensities of these impressions are not in (0, 1], "
                f"such as {examples.propensities[wrong][0]}; they are logged with each answer and cannot be repaired "
                "later: join a part of the log without them, or leave out --off-policy"
            )
        if (examples.propensities >= 1).all():
            raise SettingError(
                "--off-policy: every propensity of these impressions is 1, so nothing was explored and there is "
                "nothing to weigh; add explore.toml to the serving version first, or leave out --off-policy"
            )
        return OffPolicyWeights(clip, float(_clipped_inverse(examples.propensities, clip).mean()))

    def of_rows(self, examples: Examples) -> np.ndarray:
        """Return float32[N, H], the weight of each row in the loss of each head."""
        rows = _clipped_inverse(examples.propensities, self.clip) / self.mean
        count = int(examples.positions.max(initial=0)) + 1
        looked_at = _clipped_inverse(discounts(count), self.clip)[examples.positions]
        weights: np.ndarray = np.where(examples.labels > 0, (rows * looked_at)[:, None], rows[:, None])
        return weights.astype(np.float32)


def _clipped_inverse(chances: np.ndarray, clip: float) -> np.ndarray:
    return np.minimum(1 / chances, clip)
