"""Divides the examples of tasks into those to learn from and those that judge an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ranker.embedding.lists import Lists
from ranker.embedding.pins.tasks import Examples, chosen


def held_out(examples: Sequence[Examples], share: float, count_max: int, seed: int) -> list[tuple[Examples, Examples]]:
    """Return for each task the examples to learn from, and those to judge by.

    Sets are held out whole. Pairs are held out in both directions and of all tasks together, as what one task knows of
    two pins says much about them in another. What a pin is known to belong to is no candidate of its judging examples.
    A task that has too few examples is judged by none.

    Args:
        examples: of every task.
        share: of the examples that judge.
        count_max: so many of a task at most.
        seed: of the choice.
    """
    held = _held_pairs([one for one in examples if one.asking is not None], share, count_max, seed)
    found = []
    for number, one in enumerate(examples):
        if one.asking is None:
            order = np.random.default_rng((seed, number)).permutation(one.count)
            size = min(count_max, int(one.count * share))
            found.append((chosen(one, np.sort(order[size:])), chosen(one, np.sort(order[:size]))))
        else:
            found.append(_divided(one, np.isin(_pairs(one), held)))
    return found


def _pairs(examples: Examples) -> np.ndarray:
    """Return uint64[E], a number for the two pins of each pair, whichever of them asks."""
    assert examples.asking is not None  # noqa: S101  # told by the caller
    rows, pins = examples.lists.of(np.arange(examples.count))
    both = np.stack([examples.asking[rows], pins]).astype(np.uint64)
    found: np.ndarray = both.min(axis=0) << np.uint64(32) | both.max(axis=0)
    return found


def _held_pairs(examples: Sequence[Examples], share: float, count_max: int, seed: int) -> np.ndarray:
    """Return the numbers of the pairs to hold out."""
    numbers = [_pairs(one) for one in examples]
    if not numbers:
        return np.zeros(0, np.uint64)
    every = np.unique(np.concatenate(numbers))
    share = min(share, count_max / max(len(one) for one in numbers))
    return np.random.default_rng(seed).permutation(every)[: int(len(every) * share)]


def _divided(examples: Examples, held: np.ndarray) -> tuple[Examples, Examples]:
    """Divide the pairs of a task, of which none is held out if nothing were left to learn from."""
    held = held & ~held.all()
    learned, judge = _kept(examples, ~held), _kept(examples, held)
    assert learned.asking is not None and judge.asking is not None  # noqa: PT018, S101  # pairs have it
    place = np.searchsorted(learned.asking, judge.asking).clip(max=learned.count - 1)
    counts = np.where(learned.asking[place] == judge.asking, np.diff(learned.lists.splits)[place], 0)
    known = Lists(np.append(0, np.cumsum(counts)), learned.lists.of(place[counts > 0])[1])
    return learned, replace(judge, known=known)


def _kept(examples: Examples, kept: np.ndarray) -> Examples:
    """Return the examples with some of their pairs, without those of which none is left."""
    rows, pins = (part[kept] for part in examples.lists.of(np.arange(examples.count)))
    numbers, splits = np.unique(rows, return_index=True)
    return replace(chosen(examples, numbers), lists=Lists(np.append(splits, len(pins)).astype(np.int64), pins))
