"""The pins among which an example should find its own: all of them, or a sample that stands for all.

A sampled pin counts as the inverse of the probability with which it was drawn, so that the sum over the sample is an
unbiased estimate of the sum over all pins (Bengio and Senécal, 2008; called logQ correction by Yi et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranker.embedding.pins.inputs import PinInputs


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How to sample.

    Attributes:
        all_max: up to so many pins, all of them are candidates.
        uniform: pins drawn from all with equal probability.
        hard: pins drawn from the farther half of the neighbours of those that ask: hard to tell from what they should
            find, as these are among the nearer ones.
    """

    all_max: int = 50_000
    uniform: int = 8_192
    hard: int = 4_096


def candidates(
    inputs: PinInputs,
    asking: np.ndarray,
    needed: np.ndarray,
    settings: SampleSettings,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidates of a step.

    Those of the step's examples and the hard ones count once, as they are there in any case; only the others are a
    sample, and count for the pins that are not.

    Args:
        inputs: all pins.
        asking: int64[A], the pins that ask; with repetitions, if several examples ask with them.
        needed: int64[N], pins that must be there: all of the step's examples.
        settings: how to sample.
        generator: of the random numbers.

    Returns:
        int64[C], distinct pins, ascending; and float32[C], the logarithm of the probability with which each was drawn.
    """
    pins = len(inputs.pin_ids)
    if pins <= settings.all_max:
        return np.arange(pins), np.zeros(pins, np.float32)
    certain = np.concatenate([needed, _hard(inputs, generator.choice(asking, settings.hard), generator)])
    count = min(settings.uniform, pins)
    found = np.unique(np.concatenate([certain, generator.choice(pins, count, replace=False)]))
    drawn = ~np.isin(found, certain)
    return found, np.where(drawn, np.log(count / pins), 0).astype(np.float32)


def _hard(inputs: PinInputs, asking: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return one of the farther neighbours of each pin that has any."""
    counts = (inputs.weights[asking] > 0).sum(axis=1)
    place = counts // 2 + (generator.random(len(asking)) * (counts - counts // 2)).astype(np.int64)
    chosen = np.flatnonzero(counts)
    found: np.ndarray = inputs.index[asking[chosen], place[chosen]]
    return found
