"""What a network of pins reads: features and neighbours, of all pins in memory, or of some at a time from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ranker.embedding.graph.graph import Graph
from ranker.embedding.graph.materialised import Neighbourhoods, read_neighbourhoods
from ranker.embedding.graph.parts import Parts
from ranker.embedding.graph.walks import other_end
from ranker.embedding.pins.network import Hop
from ranker.errors import DatasetError

#: How many pins `khop` draws one hop away, and how many two hops away for each of these.
_ONE_HOP, _TWO_HOPS = 10, 5


@dataclass(frozen=True, slots=True)
class PinInputs:
    """All pins of a graph with their features and neighbours.

    Attributes:
        pin_ids: uint64[P], ascending.
        features: float32[P, F].
        index: int64[P, K], positions of the neighbours; 0 where there is none.
        weights: float32[P, K], 0 where there is no neighbour.
    """

    pin_ids: np.ndarray
    features: np.ndarray
    index: np.ndarray
    weights: np.ndarray

    def hop(self, pins: np.ndarray) -> Hop:
        """Return the neighbours of pins at int64[N]."""
        return Hop(torch.from_numpy(self.index[pins]), torch.from_numpy(self.weights[pins]))


def read_inputs(files: Parts, neighbours_max: int) -> PinInputs:
    """Read all neighbourhoods. Raises DatasetError if a file is missing or damaged.

    Args:
        files: the files.
        neighbours_max: K, how many neighbours the walks kept at most; later, a pin may have more than any has now.

    Memory: 12 K + 4 F bytes a pin, that is 0.9 GB for a million pins with 50 neighbours and 64 features.
    """
    parts = list(read_neighbourhoods(files))
    pin_ids = np.concatenate([part.pin_ids for part in parts])
    features = np.concatenate([part.features.astype(np.float32) for part in parts])
    index = np.zeros((len(pin_ids), neighbours_max), np.int64)
    weights = np.zeros((len(pin_ids), neighbours_max), np.float32)
    first = 0
    for part in parts:
        pin, place = _places(part.splits)
        index[first + pin, place] = np.searchsorted(pin_ids, part.neighbours)
        weights[first + pin, place] = part.weights
        first += len(part.pin_ids)
    return PinInputs(pin_ids, features, index, weights)


def rows_of(part: Neighbourhoods, neighbours_max: int) -> Hop:
    """Return the neighbours of some pins, as rows of `part.neighbours`.

    Raises:
        DatasetError: a pin has more than `neighbours_max`.
    """
    pin, place = _places(part.splits)
    if len(place) and place.max() >= neighbours_max:
        raise DatasetError(
            f"pins have up to {place.max() + 1} neighbours, and the network was trained with {neighbours_max}; walk "
            f"with --neighbours {neighbours_max}"
        )
    index = np.zeros((len(part.pin_ids), neighbours_max), np.int64)
    weights = np.zeros((len(part.pin_ids), neighbours_max), np.float32)
    index[pin, place] = np.arange(len(pin))
    weights[pin, place] = part.weights
    return Hop(torch.from_numpy(index), torch.from_numpy(weights))


def _places(splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each neighbour the number of its pin, and its place among that pin's neighbours."""
    pin = np.repeat(np.arange(len(splits) - 1), np.diff(splits))
    return pin, np.arange(len(pin)) - splits[pin]


def uniform_hops(graph: Graph, pins: np.ndarray, generator: np.random.Generator) -> Sequence[Hop]:
    """Draw pins one and two hops away from those at int64[N], each over a context of its own."""
    hops = []
    found = pins[:, None]
    for count in (_ONE_HOP, _TWO_HOPS):
        at = np.repeat(found, count, axis=1)
        for side in (graph.pins, graph.contexts):
            at = other_end(side, at, generator.integers(0, 1 << 32, at.shape, np.uint64))
        hops.append(Hop(torch.from_numpy(at), torch.ones(at.shape)))
        found = at
    return hops
