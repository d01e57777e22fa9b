"""Trains a network of pins: a part of what a context brings together should find the rest, among all pins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ranker.embedding.graph.graph import Graph
from ranker.embedding.pins.candidates import SampleSettings, candidates
from ranker.embedding.pins.held_out import held_out
from ranker.embedding.pins.inputs import PinInputs, uniform_hops
from ranker.embedding.pins.network import Hop, PinNetwork, PinNetworkSettings
from ranker.embedding.pins.tasks import Examples, chosen
from ranker.errors import DivergedError

#: A context asks with this share of its pins, and should find the others.
_ASKING = 0.6
#: So many of a context's pins take part in a step.
_LISTED_MAX = 200
#: Where examples judge, the scores are scaled by the best of these factors. Training makes scores too large, seldom too
#: small.
_JUDGED_AT = tuple(2 ** (step / 4) for step in range(-8, 3))
#: How many examples of each task judge an epoch: at most this share of them, and this number.
_HELD_OUT, _HELD_OUT_MAX = 0.05, 2_048


@dataclass(frozen=True, slots=True)
class PinTraining:
    """How to train.

    Attributes:
        epochs_max: passes over the examples of the largest task.
        patience: epochs without a lower loss on held-out examples after which training ends.
        batch: examples of each task in a step.
        learning_rate: of Adam.
        seed: of all random numbers.
        sample: the candidates.
    """

    epochs_max: int = 20
    patience: int = 2
    batch: int = 1_024
    learning_rate: float = 3e-3
    seed: int = 0
    sample: SampleSettings = field(default_factory=SampleSettings)


@dataclass(frozen=True, slots=True)
class PinEpoch:
    """What an epoch reached: the mean loss of its steps, and that of held-out examples at the best scale, by task."""

    number: int
    loss: float
    held_out: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some examples of a task: int64 rows of examples and positions of pins, those that ask, and those to find.

    Those that are left out are no candidates, as they ask or are known.
    """

    task: str
    weight: float
    asking: tuple[np.ndarray, np.ndarray]
    left_out: tuple[np.ndarray, np.ndarray]
    right: tuple[np.ndarray, np.ndarray]
    rows: int


def train_pins(
    inputs: PinInputs,
    graph: Graph,
    examples: Sequence[Examples],
    sizes: PinNetworkSettings,
    training: PinTraining,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    note: Callable[[PinEpoch], None] = lambda _epoch: None,
) -> PinNetwork:
    """Train a network; the weights of its best epoch count.

    Args:
        inputs: all pins.
        graph: their graph, of which `khop` draws neighbours.
        examples: of every task; the first task is the largest, or as large as the others.
        sizes: of the network.
        training: how to train.
        progress: called with the number of steps done, and how many there are at most.
        note: called after each epoch.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        tasks = [one.task.name for one in examples]
        shape = inputs.features.shape[1], inputs.index.shape[1], len(inputs.pin_ids)
        network = PinNetwork(sizes, *shape, tasks)
        return _Trainer(network, inputs, graph, examples, training).run(progress, note)


class _Trainer:
    def __init__(
        self,
        network: PinNetwork,
        inputs: PinInputs,
        graph: Graph,
        examples: Sequence[Examples],
        training: PinTraining,
    ) -> None:
        self._network, self._inputs, self._graph, self._training = network, inputs, graph, training
        self._features = torch.from_numpy(inputs.features)
        self._examples, self._judges = zip(*held_out(examples, _HELD_OUT, _HELD_OUT_MAX, training.seed), strict=True)
        self._steps = max(-(-one.count // training.batch) for one in self._examples)
        self._optimiser = torch.optim.Adam(network.parameters(), training.learning_rate)

    def run(self, progress: Callable[[int, int], None], note: Callable[[PinEpoch], None]) -> PinNetwork:
        training, generator = self._training, np.random.default_rng(self._training.seed)
        best, weights, since = np.inf, copy.deepcopy(self._network.state_dict()), 0
        for epoch in range(training.epochs_max):
            losses = []
            for step, batches in enumerate(self._epoch(generator)):
                losses.append(self._learn(batches, generator))
                progress(epoch * self._steps + step + 1, training.epochs_max * self._steps)
            judged = self._judge()
            note(PinEpoch(epoch + 1, float(np.mean(losses)), judged))
            own = sum(one.task.weight * judged[one.task.name] for one in self._judges if one.count)
            since += 1
            if own < best or not judged:
                best, weights, since = own, copy.deepcopy(self._network.state_dict()), 0
            if since >= training.patience:
                break
        self._network.load_state_dict(weights)
        return self._network.eval()

    def _epoch(self, generator: np.random.Generator) -> Iterator[list[_Batch]]:
        """Yield the batches of all tasks; a smaller task begins again."""
        orders = [_repeated(one.count, self._steps * self._training.batch, generator) for one in self._examples]
        for first in range(0, self._steps * self._training.batch, self._training.batch):
            part = slice(first, first + self._training.batch)
            yield [
                _drawn(one, np.unique(order[part]), generator)
                for one, order in zip(self._examples, orders, strict=True)
            ]

    def _learn(self, batches: list[_Batch], generator: np.random.Generator) -> float:
        self._network.train()
        losses = self._losses(batches, generator)
        loss = torch.stack([batch.weight * losses[batch.task] for batch in batches]).sum()
        if not torch.isfinite(loss):
            raise DivergedError("the loss of the pins' network is no longer finite; lower --learning-rate")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # of PyTorch
        self._optimiser.step()
        return loss.item()

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Return the loss of the held-out examples, which are asked the same at each call.

        Vectors order pins. So it hardly counts how sure of the order the scores are: training makes them surer of what
        it has seen than of anything else.
        """
        self._network.eval()
        generator = np.random.default_rng(self._training.seed)
        batches = [_drawn(one, np.arange(one.count), generator) for one in self._judges if one.count]
        losses = self._losses(batches, generator, _JUDGED_AT) if batches else {}
        return {name: loss.item() for name, loss in losses.items()}

    def _losses(
        self, batches: list[_Batch], generator: np.random.Generator, factors: Sequence[float] = (1.0,)
    ) -> dict[str, Tensor]:
        asking = np.concatenate([batch.asking[1] for batch in batches])
        right = np.concatenate([batch.right[1] for batch in batches])
        needed = np.concatenate([asking, right])
        pins, log_drawn = candidates(self._inputs, asking, needed, self._training.sample, generator)
        trained: Tensor = self._network.trained
        if self._network.training:  # some pins are new in this step, also as neighbours
            trained = trained * (torch.rand(len(trained), 1) >= self._network.settings.own_dropped)
        table = torch.cat([self._features, trained], dim=1)
        vectors = self._network(table[pins], table, self._hops(pins, generator))
        shift = torch.from_numpy(log_drawn)
        scales = {
            task: [scale.exp() * factor for factor in factors] for task, scale in self._network.log_scales.items()
        }
        return {batch.task: _loss(batch, pins, vectors[batch.task], scales[batch.task], shift) for batch in batches}

    def _hops(self, pins: np.ndarray, generator: np.random.Generator) -> Sequence[Hop]:
        if self._network.settings.variant == "khop":
            return uniform_hops(self._graph, pins, generator)
        return [self._inputs.hop(pins)]


def _repeated(count: int, total: int, generator: np.random.Generator) -> np.ndarray:
    """Return int64[total], the numbers below `count` in random order, over and over; the last ones may be fewer."""
    rounds = -(-total // count)
    order = np.concatenate([generator.permutation(count) for _ in range(rounds)])
    return order[:total] if rounds > 1 else order


def _drawn(examples: Examples, numbers: np.ndarray, generator: np.random.Generator) -> _Batch:
    """Return examples as a batch: pairs as they are, sets divided at random into those that ask and the rest."""
    own = chosen(examples, numbers)
    rows, pins = own.lists.of(np.arange(own.count))
    order = np.lexsort((generator.random(len(rows)), rows))
    pins = pins[order]  # of each row, in random order
    place = np.arange(len(rows)) - own.lists.splits[rows]
    listed = np.minimum(np.diff(own.lists.splits), _LISTED_MAX)
    if own.asking is None:
        asks = np.clip(np.round(_ASKING * listed), 1, listed - 1)[rows]
        first, others = place < asks, (place >= asks) & (place < listed[rows])
        asking = rows[first], pins[first]
    else:
        asking, others = (np.arange(own.count), own.asking), place < listed[rows]
    left_out = asking
    if own.known is not None:
        known = own.known.of(np.arange(own.count))
        left_out = np.concatenate([asking[0], known[0]]), np.concatenate([asking[1], known[1]])
    return _Batch(own.task.name, own.task.weight, asking, left_out, (rows[others], pins[others]), own.count)


def _loss(batch: _Batch, pins: np.ndarray, vectors: Tensor, scales: list[Tensor], log_drawn: Tensor) -> Tensor:
    """Return the mean over examples of how unlikely the right pins are, each of an example counting the same.

    The likelihood is a softmax over the candidates that are not left out. Of several scales, the one with the lowest
    loss counts.
    """
    rows, asking = (torch.from_numpy(part) for part in (batch.asking[0], np.searchsorted(pins, batch.asking[1])))
    questions = torch.zeros(batch.rows, vectors.shape[1]).index_add(0, rows, vectors[asking])
    cosines = functional.normalize(questions, dim=1) @ vectors.T
    there = np.isin(batch.left_out[1], pins)
    left_out = batch.left_out[0][there], np.searchsorted(pins, batch.left_out[1][there])
    nowhere = tuple(torch.from_numpy(part) for part in left_out), torch.tensor(-torch.inf)
    own, right = (torch.from_numpy(part) for part in (batch.right[0], np.searchsorted(pins, batch.right[1])))
    share = 1 / torch.bincount(own, minlength=batch.rows).clamp(min=1)

    def at(scale: Tensor) -> Tensor:
        scores = (cosines * scale - log_drawn).index_put(*nowhere)
        likelihoods = scores[own, right] - torch.logsumexp(scores, dim=1)[own]
        return -(likelihoods * share[own]).sum() / batch.rows

    return torch.stack([at(scale) for scale in scales]).min()
