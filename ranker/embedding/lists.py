"""Lists of pins of different lengths, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Lists:
    """A list of pins for each context.

    Attributes:
        splits: int64[C + 1]; context c has the pins from `splits[c]` to `splits[c + 1]`.
        pins: int64[E], positions of pins, distinct in a list.
    """

    splits: np.ndarray
    pins: np.ndarray

    def of(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for each pin of these contexts, in their order, the number of its context among them, and the pin."""
        counts = np.diff(self.splits)[contexts]
        numbers = np.repeat(np.arange(len(contexts)), counts)
        first = np.repeat(self.splits[contexts] - np.cumsum(counts) + counts, counts)
        return numbers, self.pins[first + np.arange(len(first))]

    def only(self, contexts: np.ndarray) -> Lists:
        """Return the lists of these contexts, in their order."""
        return Lists(np.append(0, np.cumsum(np.diff(self.splits)[contexts])), self.of(contexts)[1])


def lists_of(contexts: np.ndarray, pins: np.ndarray) -> tuple[np.ndarray, Lists]:
    """Gather edges into lists.

    Args:
        contexts: int64[E].
        pins: int64[E].

    Returns:
        int64[C], the contexts, ascending; and the distinct pins of each, ascending.
    """
    order = np.lexsort((pins, contexts))
    contexts, pins = contexts[order], pins[order]
    first = np.ones(len(pins), bool)
    first[1:] = (contexts[1:] != contexts[:-1]) | (pins[1:] != pins[:-1])
    contexts, pins = contexts[first], pins[first]
    found, splits = np.unique(contexts, return_index=True)
    return found, Lists(np.append(splits, len(pins)).astype(np.int64), pins)
