"""Divides the examples of tasks into those to learn from and those that judge an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ranker.embedding.lists import Lists
from ranker.embedding.pins.tasks import Examples, chosen


def held_out(examples: Sequence[Examples], share: float, count_max: int, seed: int) -> list[tuple[Examples, Examples]]:
    """Return for each task the examples to learn from, and those to judge by.

    Sets are held out whole. A pair that judges is learned in neither direction and by no task of pairs, as what one
    task knows of two pins says much about them in another; sets that hold both pins are still learned. What the same
    task has learned that a pin belongs to is no candidate when the pin judges. A task that has too few examples is
    judged by none.

    Args:
        examples: of every task.
        share: of a task's sets, or pairs of either direction, that judge; less than 1.
        count_max: so many of them at most.
        seed: of the choice.
    """
    places = _places(examples, seed)
    held = _held(places, share, count_max)
    found = []
    for number, one in enumerate(examples):
        if number in places:
            own = places[number]
            taken = np.isin(own, held)
            found.append(_divided(one, taken, np.isin(own, np.unique(own[taken])[:count_max])))
            continue
        order = np.random.default_rng((seed, number)).permutation(one.count)
        size = min(count_max, int(one.count * share))
        found.append((chosen(one, np.sort(order[size:])), chosen(one, np.sort(order[:size]))))
    return found


def _places(examples: Sequence[Examples], seed: int) -> dict[int, np.ndarray]:
    """Return int64[E] for each task of pairs: the place of each pair, of either direction, in a random order of all."""
    pairs = {number: _pairs(one, one.asking) for number, one in enumerate(examples) if one.asking is not None}
    every = np.unique(np.concatenate([np.zeros(0, np.uint64), *pairs.values()]))
    order = np.random.default_rng(seed).permutation(len(every))
    return {number: order[np.searchsorted(every, own)] for number, own in pairs.items()}


def _pairs(examples: Examples, asking: np.ndarray) -> np.ndarray:
    """Return uint64[E], a number for the two pins of each pair, whichever of them asks."""
    rows, pins = examples.lists.of(np.arange(examples.count))
    both = np.stack([asking[rows], pins]).astype(np.uint64)
    found: np.ndarray = both.min(axis=0) << np.uint64(32) | both.max(axis=0)
    return found


def _held(places: dict[int, np.ndarray], share: float, count_max: int) -> np.ndarray:
    """Return the places of the pairs to hold out: the first of each task, but never all of a task."""
    held = np.zeros(0, np.int64)
    for own in places.values():
        distinct = np.unique(own)
        held = np.union1d(held, distinct[: min(count_max, int(len(distinct) * share))])
    for own in places.values():
        if np.isin(own, held).all():
            held = np.setdiff1d(held, own)
    return held


def _divided(examples: Examples, taken: np.ndarray, judging: np.ndarray) -> tuple[Examples, Examples]:
    """Divide the pairs of a task: learn from those that are not taken, and judge by some of the others."""
    learned, judge = _kept(examples, ~taken), _kept(examples, judging)
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
