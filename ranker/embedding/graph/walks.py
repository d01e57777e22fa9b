"""Random walks with restart from each pin, and the pins that they visit most.

A walk goes from a pin to one of its contexts and on to one of that context's pins, each with equal probability. After
each such step it ends with the probability of a restart. So the expected number of visits of a pin is proportional to
its personalised PageRank, and a count of visits is an unbiased estimate of it (Eksombatchai et al., "Pixie", 2018;
Ying et al., "PinSage", 2018).

All random numbers are functions of the seed, the pin, the walk and the step, so that any division of the pins among
processes gives the same walks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranker.embedding.graph.graph import Graph, Side

#: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST, _HALF = np.uint64(31), np.uint64(32)
#: Walks that are made at the same time; they bound the memory.
_WALKS_MAX = 1 << 19


@dataclass(frozen=True, slots=True)
class WalkSettings:
    """How to walk.

    Attributes:
        walks: walks from each pin.
        restart: probability with which a walk ends after a step.
        neighbours: how many of the most visited pins are kept.
        seed: of the random numbers.
    """

    walks: int = 200
    restart: float = 0.5
    neighbours: int = 50
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The most visited pins of each of several pins, the most visited first; at equal counts, the lower position.

    Attributes:
        splits: int64[N + 1]; pin i of these has the neighbours from `splits[i]` to `splits[i + 1]`.
        pins: int64[K], positions of the neighbours. A pin is not its own neighbour.
        weights: float32[K], the share of the pin's visits of other pins that were of this one.
    """

    splits: np.ndarray
    pins: np.ndarray
    weights: np.ndarray


def neighbours_of(graph: Graph, pins: np.ndarray, settings: WalkSettings) -> Neighbours:
    """Walk from the pins at int64[N], which are distinct, and keep those that were visited most.

    Cost: about 1 / restart steps a walk, and a sort of all visits; memory for half a million walks at a time.
    """
    at_once = max(1, _WALKS_MAX // settings.walks)
    parts = [_most_visited(graph, pins[n : n + at_once], settings) for n in range(0, len(pins), at_once)]
    counts, found, weights = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Neighbours(np.concatenate([[0], np.cumsum(counts)]), found, weights)


def visits(graph: Graph, pins: np.ndarray, settings: WalkSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the visits of the walks from some pins.

    Args:
        graph: the graph.
        pins: int64[N], positions of the pins to walk from.
        settings: how to walk.

    Returns:
        Three int64[K] with an entry for each pin and pin visited from it, in ascending order: the number of the pin
        walked from, among `pins`; the position of the pin visited; and how often it was.
    """
    start = np.repeat(np.arange(len(pins)), settings.walks)
    at = pins[start]
    numbers = np.tile(np.arange(settings.walks, dtype=np.uint64), len(pins))
    seed = np.uint64(settings.seed * int(_GOLDEN) % 2**64)
    keys = _mixed(_mixed(graph.pin_ids[pins] + seed)[start] + numbers)
    goes_on_below = np.uint64(round((1 - settings.restart) * 2**32))
    found = []
    everything = np.uint64(len(graph.pin_ids))
    while len(at):
        keys = keys + _GOLDEN
        at = other_end(graph.pins, at, _mixed(keys) >> _HALF)
        keys = keys + _GOLDEN
        drawn = _mixed(keys)
        at = other_end(graph.contexts, at, drawn >> _HALF)
        found.append(start.astype(np.uint64) * everything + at.astype(np.uint64))
        goes_on = (drawn & np.uint64(0xFFFFFFFF)) < goes_on_below
        at, start, keys = at[goes_on], start[goes_on], keys[goes_on]
    visited, counts = np.unique(np.concatenate(found), return_counts=True)
    return (visited // everything).astype(np.int64), (visited % everything).astype(np.int64), counts


def other_end(side: Side, at: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return int64[N], a node on the other side for each of N nodes, by N random uint64 below 2^32."""
    first = side.starts[at]
    degree = (side.starts[at + 1] - first).astype(np.uint64)
    chosen: np.ndarray = side.others[first + ((drawn * degree) >> _HALF).astype(np.int64)].astype(np.int64)
    return chosen


def _most_visited(graph: Graph, pins: np.ndarray, settings: WalkSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of neighbours of each of the pins, and the positions and weights of all of these."""
    start, pin, count = visits(graph, pins, settings)
    others = pin != pins[start]
    start, pin, count = start[others], pin[others], count[others]
    totals = np.bincount(start, count, len(pins))
    order = np.lexsort((pin, -count, start))
    start, pin, count = start[order], pin[order], count[order]
    before = np.searchsorted(start, np.arange(len(pins)))
    kept = np.arange(len(start)) - before[start] < settings.neighbours
    start, pin, count = start[kept], pin[kept], count[kept]
    return np.bincount(start, minlength=len(pins)), pin, (count / totals[start]).astype(np.float32)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return uint64[N] that look random: SplitMix64's finaliser of N numbers."""
    for shift, factor in _ROUNDS:
        numbers = (numbers ^ (numbers >> shift)) * factor
    mixed: np.ndarray = numbers ^ (numbers >> _LAST)
    return mixed
