"""Trains the network of users' vectors: which of the pins that a user will like does the vector predict?

The three losses differ in which actions of a sequence predict which later ones (Pancha et al., section 3.3):
`next`: each predicts the next one. `all`: one of each sequence predicts all in a horizon. `dense`: each predicts all in
a horizon.

A prediction is a softmax over pins. Where all pins are too many, it is over those that the batch predicts and random
ones, each weighted by 1 / the probability that it is among them (logQ correction; Yi et al., RecSys 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from feature_client.groups import Frozen
from ranker.embedding.users.network import NetworkSizes, UserNetwork, tensors
from ranker.embedding.users.sequences import PinRows, Sequences, windows
from ranker.errors import DatasetError, DivergedError

_DAY_MS = 86_400_000
Loss = Literal["next", "all", "dense"]


class FitSettings(Frozen):
    """The shape of a network, and how to train it.

    Attributes:
        dim: numbers of a user's vector.
        layers: transformer layers.
        heads: attention heads.
        length_max: how many of a user's last actions are read.
        table: whether the network learns a vector of every pin; a pin that is new then has its given one only.
        loss: which actions predict which later ones.
        horizon_days: how far ahead `all` and `dense` predict.
        horizon_actions: the same, in actions, for data without times.
        positives: how many later pins one action predicts at a time, drawn from those of the horizon.
        predictions: how many actions of a batch predict, at most; drawn from all that can.
        candidates: a softmax over more pins than this is sampled: so many random ones, and those of the batch.
        epochs: how often each sequence is read.
        batch: sequences in a batch.
        rate: learning rate of Adam, which falls to zero along a cosine.
        dropout: share of the numbers between layers that are left out in training.
        seed: of everything random.
    """

    dim: Annotated[int, Field(ge=2, le=4096)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    heads: Annotated[int, Field(ge=1)] = 2
    length_max: Annotated[int, Field(ge=1, le=4096)] = 256
    table: bool = True
    loss: Loss = "dense"
    horizon_days: Annotated[float, Field(gt=0)] = 28.0
    horizon_actions: Annotated[int, Field(ge=1)] = 64
    positives: Annotated[int, Field(ge=1)] = 4
    predictions: Annotated[int, Field(ge=1)] = 1024
    candidates: Annotated[int, Field(ge=1)] = 4096
    epochs: Annotated[int, Field(ge=1)] = 10
    batch: Annotated[int, Field(ge=1)] = 64
    rate: Annotated[float, Field(gt=0)] = 3e-3
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _heads_share_the_numbers(self) -> FitSettings:
        if self.dim % self.heads:
            raise ValueError(f"{self.dim} numbers cannot be shared by {self.heads} heads equally")
        return self


@dataclass(frozen=True, slots=True)
class Targets:
    """The later actions that each action predicts.

    Attributes:
        events: int64[T], those that show that the user liked the pin, by number, ascending.
        first: int64[E], of each action, the first of `events` that it predicts.
        stop: int64[E], that after the last.
    """

    events: np.ndarray
    first: np.ndarray
    stop: np.ndarray


def targets_of(sequences: Sequences, settings: FitSettings) -> Targets:
    """Return what each action predicts: liked pins of the same user, strictly later in the order of the sequence."""
    events = np.flatnonzero(sequences.liked)
    place = np.arange(len(sequences.pins))
    end = np.repeat(sequences.splits[1:], np.diff(sequences.splits))
    if settings.loss != "next":
        end = np.minimum(end, _horizon(sequences, settings, place))
    first, stop = np.searchsorted(events, place + 1), np.searchsorted(events, end)
    if settings.loss == "next":
        stop = np.minimum(stop, first + 1)
    return Targets(events, first, np.maximum(stop, first))


def _horizon(sequences: Sequences, settings: FitSettings, place: np.ndarray) -> np.ndarray:
    """Return the first action beyond the horizon of each."""
    if sequences.time_ms is None:
        return place + 1 + settings.horizon_actions
    # One ascending number for user and time: times are counted from the first, and users are farther apart than these.
    since = sequences.time_ms - sequences.time_ms.min(initial=0)
    horizon_ms = round(settings.horizon_days * _DAY_MS)
    apart = int(since.max(initial=0)) + horizon_ms + 1
    key = sequences.users * apart + since
    found: np.ndarray = np.searchsorted(key, key + horizon_ms, side="right")
    return found


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the actions of a batch predict.

    Attributes:
        row, column: int64[M], the place of each action in its batch.
        pins: int64[M, K], what it predicts; positions of pins.
    """

    row: np.ndarray
    column: np.ndarray
    pins: np.ndarray


def predictions_of(
    sequences: Sequences,
    targets: Targets,
    first: np.ndarray,
    stop: np.ndarray,
    settings: FitSettings,
    rng: np.random.Generator,
) -> Predictions:
    """Draw what the actions of windows predict; of `all`, one of each window does."""
    lengths = stop - first
    row = np.repeat(np.arange(len(first)), lengths)
    column = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    event = first[row] + column
    able = targets.stop[event] > targets.first[event]
    row, column, event = row[able], column[able], event[able]
    if settings.loss == "all":
        order = np.lexsort((rng.random(len(row)), row))
        one = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
        row, column, event = row[one], column[one], event[one]
    if len(row) > settings.predictions:
        chosen = np.sort(rng.choice(len(row), settings.predictions, replace=False))
        row, column, event = row[chosen], column[chosen], event[chosen]
    count = 1 if settings.loss == "next" else settings.positives
    begin, end = targets.first[event][:, None], targets.stop[event][:, None]
    drawn = begin + (rng.random((len(row), count)) * (end - begin)).astype(np.int64)
    return Predictions(row, column, sequences.pins[targets.events[drawn]])


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pins over which a softmax goes.

    Attributes:
        pins: int64[C], ascending.
        log_share: float32[C], the logarithm of the probability that a pin is among them.
    """

    pins: np.ndarray
    log_share: np.ndarray


def candidates_of(
    predicted: np.ndarray, shares: np.ndarray, settings: FitSettings, rng: np.random.Generator
) -> Candidates:
    """Return all pins, or those of the batch and random ones.

    Args:
        predicted: int64[M, K], the pins that the batch predicts.
        shares: float64[P], of each pin in all that is predicted.
        settings: the number of candidates.
        rng: draws the random ones.
    """
    count = len(shares)
    if count <= settings.candidates:
        return Candidates(np.arange(count), np.zeros(count, np.float32))
    random = rng.integers(count, size=settings.candidates)
    pins = np.unique(np.concatenate([predicted.ravel(), random]))
    expected = predicted.size * shares[pins] + settings.candidates / count
    return Candidates(pins, np.log(-np.expm1(-expected)).astype(np.float32))


def softmax_loss(users: Tensor, pins: Tensor, temperature: Tensor, places: Tensor, log_share: Tensor) -> Tensor:
    """Return the mean negative log-probability of predicted pins.

    Args:
        users: float[M, D].
        pins: float[C, D], the candidates.
        temperature: float[].
        places: int64[M, K], of what is predicted among the candidates.
        log_share: float[C], the logarithm of each candidate's probability to be one. What a row predicts is one
            anyway, and has no correction.
    """
    logits = temperature * (users @ pins.T)
    correction = log_share.expand(len(users), -1).scatter(1, places, 0.0)
    normaliser = torch.logsumexp(logits - correction, dim=1)
    return (normaliser - logits.gather(1, places).mean(dim=1)).mean()


def fit(
    sequences: Sequences,
    pins: PinRows,
    sizes: NetworkSizes,
    settings: FitSettings,
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
    after_epoch: Callable[[int, UserNetwork], None] = lambda _epoch, _network: None,
) -> UserNetwork:
    """Train a network; equal arguments give equal weights on one machine.

    Args:
        sequences: what to learn from, none of them empty; pins are positions in `pins`.
        pins: what is known of the pins that occur in them.
        sizes: of the network.
        settings: how to train.
        progress: told after every batch.
        after_epoch: told after every epoch.

    Raises:
        DatasetError: no action has a later one to predict.
        DivergedError: the loss is no longer finite.
    """
    targets = targets_of(sequences, settings)
    shares = np.bincount(sequences.pins[targets.events], minlength=len(pins.rows)) / max(1, len(targets.events))
    if not (targets.stop > targets.first).any():
        raise DatasetError("no user liked a pin after another action, so there is nothing to predict; use more data")
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    network = UserNetwork(sizes, settings.dropout).train()
    rows, vectors = torch.from_numpy(pins.rows), torch.from_numpy(pins.vectors.astype(np.float32))
    batches = [_batches(sequences, sizes.length_max, settings.batch, rng) for _ in range(settings.epochs)]
    total, done = sum(map(len, batches)), 0
    optimizer = torch.optim.Adam(network.parameters(), settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for epoch, of_epoch in enumerate(batches):
        for first, stop in of_epoch:
            done += 1
            predicted = predictions_of(sequences, targets, first, stop, settings, rng)
            if len(predicted.row):
                among = candidates_of(predicted.pins, shares, settings, rng)
                users = network(*tensors(windows(sequences, pins, first, stop, int((stop - first).max()))))
                candidates = torch.from_numpy(among.pins)
                loss = softmax_loss(
                    users[torch.from_numpy(predicted.row), torch.from_numpy(predicted.column)],
                    network.pin_vectors(rows[candidates], vectors[candidates]),
                    network.temperature,
                    torch.from_numpy(np.searchsorted(among.pins, predicted.pins)),
                    torch.from_numpy(among.log_share),
                )
                if not torch.isfinite(loss):
                    raise DivergedError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower the learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                progress(done, total, f"loss {loss.item():.3f}")
            schedule.step()
        after_epoch(epoch, network)
    return network.eval()


def _batches(
    sequences: Sequences, length_max: int, size: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the windows of an epoch, in random order of batches of about equal lengths.

    A sequence that is longer than a window is cut at places that are drawn anew for every epoch.
    """
    lengths = np.diff(sequences.splits)
    first_cut = np.where(lengths > length_max, rng.integers(1, length_max + 1, len(lengths)), lengths)
    more = np.maximum(-(-(lengths - first_cut) // length_max), 0)
    user = np.repeat(np.arange(len(lengths)), more + 1)
    number = np.arange(len(user)) - np.repeat(np.cumsum(more + 1) - (more + 1), more + 1)
    start, end = sequences.splits[user], sequences.splits[user + 1]
    stop = np.minimum(start + first_cut[user] + number * length_max, end)
    first = np.where(number == 0, start, start + first_cut[user] + (number - 1) * length_max)
    order = np.lexsort((rng.random(len(first)), stop - first))
    chosen = [order[i : i + size] for i in range(0, len(order), size)]
    return [(first[chosen[i]], stop[chosen[i]]) for i in rng.permutation(len(chosen))]
