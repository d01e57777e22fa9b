"""Minibatches. All randomness derives from (seed, epoch, batch), so a run can resume at any batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.engine import ROW_REQUEST, FeatureBatch
from model_store.bundle.tensor_sources import compared_actions
from model_store.model.recency import recency_of_ages
from model_store.model.similarities import similarities_of_batch
from ranker.training.examples import Examples
from ranker.training.off_policy import OffPolicyWeights
from ranker.training.ranks import Ranks
from ranker.training.time_window import draw_windows_s, hide_newest

_Built = TypeVar("_Built")

#: The purpose of a random generator, part of its seed, so that no two generators draw the same numbers.
_ORDER, _WINDOWS, _DROPOUT = range(3)


#: The network computes about this many rows at once: what it keeps of them for their gradient then fits the caches.
PART_ROWS = 512


@dataclass(frozen=True, slots=True)
class Part:
    """Some requests with all of their rows, as many as the network computes at once.

    Attributes:
        inputs: arguments of the network.
        labels: float32[n, H].
        requests: how many.
        weights: float32[n, H], of each row in the loss of each head; None weighs all alike.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    requests: int
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Minibatch:
    """One rank's share of a minibatch: at least one part, and the number of rows over all ranks."""

    parts: tuple[Part, ...]
    rows: int


class Minibatches:
    """The minibatches of all epochs. A request is never split: its candidates and user tensors stay together.

    Args:
        examples: training examples.
        requests: requests per minibatch, over all ranks.
        seed: seed of the order, the time windows and dropout.
        ranks: decides which rank takes which requests.
        window_h_max: upper bound of the random time window in hours; 0 hides nothing.
        window_share: share of the requests to which a time window applies.
        off_policy: gives the rows' weights; None weighs all alike.
    """

    def __init__(
        self,
        examples: Examples,
        requests: int,
        seed: int,
        ranks: Ranks,
        window_h_max: float = 0.0,
        window_share: float = 1.0,
        off_policy: OffPolicyWeights | None = None,
    ) -> None:
        self._examples = examples
        self._requests = requests
        self._seed = seed
        self._ranks = ranks
        reads_sequence = "sequence_actions" in examples.batch.request
        self._window_h_max = window_h_max if reads_sequence else 0.0
        self._window_share = window_share
        self._rows = np.diff(examples.batch.row_splits)
        self._off_policy = off_policy

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._requests)

    def epoch(self, epoch: int, first: int) -> Iterator[Minibatch]:
        """Yield the minibatches of an epoch from `first` on; each is built while the network processes the last."""
        order = np.random.default_rng([self._seed, _ORDER, epoch]).permutation(len(self._rows))
        return _ahead(lambda batch: self._build(order, epoch, batch), range(first, len(self)))

    def dropout_seed(self, epoch: int, batch: int) -> int:
        """Return the seed of PyTorch's generator for a batch; each rank has its own dropout."""
        entropy = [self._seed, _DROPOUT, epoch, batch, self._ranks.rank]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _build(self, order: np.ndarray, epoch: int, batch: int) -> Minibatch:
        whole = order[batch * self._requests : (batch + 1) * self._requests]
        part = self._examples.take(self._ranks.share(whole))
        if self._window_h_max > 0:
            # Drawn for the requests of all ranks, so that the number of ranks changes nothing.
            rng = np.random.default_rng([self._seed, _WINDOWS, epoch, batch])
            windows_s = self._ranks.share(draw_windows_s(rng, len(whole), self._window_h_max, self._window_share))
            part = _with_hidden(part, windows_s)
        return Minibatch(tuple(_parts(part, self._off_policy)), int(self._rows[whole].sum()))


def in_order(examples: Examples, ranks: Ranks) -> Iterator[Part]:
    """Yield a rank's requests in the order of the examples, with nothing hidden, for validation and prediction."""
    if len(own := ranks.share(np.arange(examples.batch.requests))):
        yield from _parts(examples.take(own), None)


def tensors(batch: FeatureBatch) -> dict[str, Tensor]:
    """Return a batch as arguments of the network."""
    arrays = {**batch.request, **batch.candidate, ROW_REQUEST: batch.row_request()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _parts(examples: Examples, off_policy: OffPolicyWeights | None) -> Iterator[Part]:
    """Divide examples into parts: consecutive requests up to `PART_ROWS` rows, or a single one with more.

    Without requests there is one empty part: a rank without any still has to take part in a step.
    """
    splits = examples.batch.row_splits
    start = 0
    while True:
        stop = int(np.searchsorted(splits, splits[start] + PART_ROWS, side="right")) - 1
        stop = min(max(stop, start + 1), examples.batch.requests)
        part = examples.take(np.arange(start, stop))
        weights = None if off_policy is None else torch.from_numpy(off_policy.of_rows(part))
        yield Part(tensors(part.batch), torch.from_numpy(part.labels), part.batch.requests, weights)
        start = stop
        if start >= examples.batch.requests:
            return


def _with_hidden(part: Examples, windows_s: np.ndarray) -> Examples:
    request = dict(part.batch.request)
    request["sequence_actions"], request["sequence_embeddings"] = hide_newest(
        request["sequence_actions"], request["sequence_embeddings"], part.ages_s, windows_s
    )
    if "recency" in request:
        request["recency"] = recency_of_ages(np.where(part.ages_s < windows_s[:, None], np.inf, part.ages_s))
    candidate = dict(part.batch.candidate)
    batch = FeatureBatch(request, candidate, part.batch.row_splits)
    if "similarities" in candidate:
        candidate["similarities"] = similarities_of_batch(batch, compared_actions(candidate["similarities"].shape[1]))
    return replace(part, batch=batch)


def _ahead(build: Callable[[int], _Built], numbers: range) -> Iterator[_Built]:
    """Yield `build(number)` for each number in order, and build the next one on another thread meanwhile."""
    with ThreadPoolExecutor(1, "minibatches") as worker:
        waiting = None
        for number in numbers:
            building = worker.submit(build, number)
            if waiting is not None:
                yield waiting.result()
            waiting = building
        if waiting is not None:
            yield waiting.result()
