"""How well vectors of pins find what somebody will like next, among all pins: recall, rank and coverage.

The question is a context, such as a user or a board: the mean of its known pins' vectors asks, all other pins answer in
the order of their dot products with it, and its held-out pins are the right answers. The search is exact. There are no
parameters of users: a context that nobody has seen in training asks as well as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ranker.data.embeddings import PinEmbeddings, rows_of
from ranker.data.users.interests import InterestSettings, interests_of
from ranker.embedding.graph.edges import Edges
from ranker.embedding.lists import Lists
from ranker.embedding.vector_file import UserVectors
from ranker.errors import DatasetError
from ranker.evaluation.bootstrap import RESAMPLES, Estimate, Resampling, resample

#: At how many answers recall is measured.
CUTOFFS = (10, 20, 100)
#: Held-out pins by the number of their known edges: the lower bounds of the slices.
SLICES = (0, 1, 10, 100)
#: The rank of pins that cannot be found.
NOWHERE = np.iinfo(np.int64).max
#: Scores in memory at a time.
_SCORES_MAX = 1 << 24
#: How far the neighbourhood of a medoid reaches, in cosines. Above 0.5, what lies halfway between two interests at
#: right angles would count more than what is near one. On earlier events of MovieLens-1M, smaller ones find less.
_WIDTH = 0.4


@dataclass(frozen=True, slots=True)
class Questions:
    """Contexts that have both known and held-out pins.

    Attributes:
        context_ids: uint64[C], ascending.
        pin_ids: uint64[P], ascending; the candidates.
        known: what a context asks with, the pin of its last edge first; never an answer of it.
        held: the right answers.
        counts: int64[P], known edges of each pin.
    """

    context_ids: np.ndarray
    pin_ids: np.ndarray
    known: Lists
    held: Lists
    counts: np.ndarray

    @property
    def contexts(self) -> int:
        return len(self.held.splits) - 1


def questions(
    known: Edges, held: Edges, vectors: Sequence[PinEmbeddings] = (), contexts_max: int | None = None, seed: int = 0
) -> Questions:
    """Return the contexts to ask with.

    Args:
        known: the edges that a context asks with, the oldest first: in the order of their times, or of their file.
        held: the edges that it should find. Those that are known, too, do not count.
        vectors: their pins are candidates besides those of the edges.
        contexts_max: maximum number of contexts, drawn by `seed`; None for all.
        seed: of the draw.

    Raises:
        DatasetError: no context has both known and held-out pins.
    """
    sides = [_ends(edges) for edges in (known, held)]
    context_ids = np.unique(np.concatenate([contexts for contexts, _ in sides]))
    pin_ids = np.unique(np.concatenate([*(pins for _, pins in sides), *(one.pin_ids for one in vectors)]))
    # Edges as one number each.
    of_known, of_held = (
        np.searchsorted(context_ids, contexts) * len(pin_ids) + np.searchsorted(pin_ids, pins)
        for contexts, pins in sides
    )
    of_known, of_held = _last_first(of_known, len(pin_ids)), np.setdiff1d(of_held, of_known)
    contexts = np.intersect1d(of_known // len(pin_ids), of_held // len(pin_ids))
    if not len(contexts):
        raise DatasetError("no context has both known and held-out pins; are the identifiers of both the same?")
    if contexts_max is not None and contexts_max < len(contexts):
        contexts = np.sort(np.random.default_rng(seed).choice(contexts, contexts_max, replace=False))
    counts = np.bincount(of_known % len(pin_ids), minlength=len(pin_ids))
    asked, right = (_lists(edges, contexts, len(pin_ids)) for edges in (of_known, of_held))
    return Questions(context_ids[contexts], pin_ids, asked, right, counts)


def _ends(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Return all contexts and pins of edges, uint64[E] each."""
    nothing = np.zeros(0, np.uint64)
    contexts, pins = zip((nothing, nothing), *edges.batches(), strict=True)
    return np.concatenate(contexts), np.concatenate(pins)


def _last_first(edges: np.ndarray, pins: int) -> np.ndarray:
    """Return edges as one number each, by context, every edge once, and the last of a context first."""
    distinct, age = np.unique(edges[::-1], return_index=True)
    ordered: np.ndarray = distinct[np.lexsort((age, distinct // pins))]
    return ordered


def _lists(edges: np.ndarray, contexts: np.ndarray, pins: int) -> Lists:
    """Return the pins of these contexts, from edges as numbers, by context."""
    chosen = edges[np.isin(edges // pins, contexts)]
    return Lists(np.searchsorted(chosen // pins, np.append(contexts, np.iinfo(np.int64).max)), chosen % pins)


@dataclass(frozen=True, slots=True)
class Scorer:
    """A way to answer.

    Attributes:
        scores: returns float32[N, P], the scores of all pins for N contexts, -inf for pins that cannot be found.
        findable: bool[P], the pins that can be found by any context.
    """

    scores: Callable[[np.ndarray], np.ndarray]
    findable: np.ndarray


def by_vectors(asked: Questions, vectors: PinEmbeddings) -> Scorer:
    """Return the scores by the dot product with the mean of a context's known pins.

    Pins without a vector cannot be found, and a context whose known pins have none finds nothing.
    """
    numbers = vectors.of(asked.pin_ids).astype(np.float32)
    findable = np.asarray(numbers.any(axis=1))

    def scores(contexts: np.ndarray) -> np.ndarray:
        number, pins = asked.known.of(contexts)
        sums = np.zeros((len(contexts), numbers.shape[1]), np.float32)
        np.add.at(sums, number, numbers[pins])
        found = sums @ numbers.T
        found[:, ~findable] = -np.inf
        found[~sums.any(axis=1)] = -np.inf
        return found

    return Scorer(scores, findable)


def by_users(asked: Questions, users: UserVectors, vectors: PinEmbeddings) -> Scorer:
    """Return the scores by the dot product with the vector of a user; the contexts are users.

    Users without a vector find nothing.

    Raises:
        DatasetError: the vectors of users and pins are not of one space.
    """
    if users.origin.space != vectors.space:
        raise DatasetError(
            f"the users' vectors are of {users.origin.space.ref}, and the pins' of {vectors.space.ref}; pass those "
            "that `pinrank embed users` wrote together"
        )
    numbers = vectors.of(asked.pin_ids).astype(np.float32)
    own = rows_of(users.user_ids, users.vectors, asked.context_ids).astype(np.float32)
    findable = np.asarray(numbers.any(axis=1))

    def scores(contexts: np.ndarray) -> np.ndarray:
        found: np.ndarray = own[contexts] @ numbers.T
        found[:, ~findable] = -np.inf
        found[~own[contexts].any(axis=1)] = -np.inf
        return found

    return Scorer(scores, findable)


def by_interests(asked: Questions, vectors: PinEmbeddings, settings: InterestSettings) -> Scorer:
    """Return the scores by the cosines with the medoids of a context's known pins, near ones counting most.

    A score is the sum over clusters of their importance times exp((cosine - 1) / _WIDTH): how dense what is known lies
    around a candidate. The pins of a context have an order here, but no times, so a cluster is as important as it is
    large.
    """
    unit, findable = _directions(asked, vectors)

    def scores(contexts: np.ndarray) -> np.ndarray:
        found = np.full((len(contexts), len(unit)), -np.inf, np.float32)
        for row, (medoids, importances) in enumerate(_clusters(asked, unit, findable, settings, contexts)):
            if len(medoids):
                found[row] = importances @ np.exp((unit[medoids] @ unit.T - 1) / _WIDTH)
        found[:, ~findable] = -np.inf
        return found

    return Scorer(scores, findable)


def ranked_by_best_interest(asked: Questions, vectors: PinEmbeddings, settings: InterestSettings) -> Ranks:
    """Ask each medoid by itself, and take a held-out pin's best rank: an oracle chooses the cluster for every pin.

    This is how PinnerFormer's authors compare one vector with clusters (Pancha et al., 2022). Recall@100 then counts
    the first 100 answers of every cluster, so more clusters may show more pins.
    """
    unit, findable = _directions(asked, vectors)
    ranks, shown = [], np.zeros(len(unit), bool)
    contexts = np.arange(asked.contexts)
    clusters = _clusters(asked, unit, findable, settings, contexts)
    for context, (medoids, _) in zip(contexts, clusters, strict=True):
        _, known = asked.known.of(contexts[context : context + 1])
        _, held = asked.held.of(contexts[context : context + 1])
        best = np.full(len(held), NOWHERE)
        if len(medoids):
            scores = unit[medoids] @ unit.T
            scores[:, ~findable] = -np.inf
            scores[:, known] = -np.inf
            shown[_first(scores)] = True
            for row in scores:
                places = np.concatenate(list(_ranks(row[None], np.zeros(len(held), np.int64), held)))
                best = np.minimum(best, places)
        ranks.append(best)
    return Ranks(np.concatenate(ranks), shown)


def _directions(asked: Questions, vectors: PinEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return float32[P, D] vectors of length one, and bool[P], the pins that have one."""
    numbers = vectors.of(asked.pin_ids).astype(np.float32)
    lengths = np.linalg.norm(numbers, axis=1, keepdims=True)
    return numbers / np.where(lengths > 0, lengths, 1), lengths[:, 0] > 0


def _clusters(
    asked: Questions, unit: np.ndarray, findable: np.ndarray, settings: InterestSettings, contexts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the medoids of what each context knows, as positions of pins, and float64[K], their importances.

    There are none where a context knows no pin with a vector.
    """
    number, pins = asked.known.of(contexts)
    splits = np.searchsorted(number, np.arange(len(contexts) + 1))
    for first, stop in pairwise(splits):
        own = pins[first:stop][findable[pins[first:stop]]][: settings.pins_max]
        if not len(own):
            yield own, np.zeros(0)
            continue
        # Milliseconds apart: as important, but of equal clusters that with the last pin comes first.
        found = interests_of(unit[own], np.arange(len(own)), settings)
        yield own[found.medoids], found.importances


def by_popularity(asked: Questions) -> Scorer:
    """Return the number of known edges of each pin as its score for every context."""
    counts = asked.counts.astype(np.float32)
    return Scorer(lambda contexts: np.tile(counts, (len(contexts), 1)), np.ones(len(counts), bool))


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where the held-out pins are in the answers.

    Attributes:
        ranks: int64[H], the position of each held-out pin in the answer of its context, 0 for the first; NOWHERE
            for pins that cannot be found. Of equal scores, the pin with the lower identifier comes first.
        shown: bool[P], whether a pin is among the first ten of any answer.
    """

    ranks: np.ndarray
    shown: np.ndarray


def ranked(
    asked: Questions, scorer: Scorer, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Ranks:
    """Answer every question. Cost: a matrix product of all contexts and pins, in blocks of 64 MB."""
    pins = len(asked.pin_ids)
    block = max(1, _SCORES_MAX // pins)
    ranks, shown = [], np.zeros(pins, bool)
    for start in range(0, asked.contexts, block):
        contexts = np.arange(start, min(start + block, asked.contexts))
        scores = scorer.scores(contexts)
        scores[asked.known.of(contexts)] = -np.inf
        shown[_first(scores)] = True
        ranks += list(_ranks(scores, *asked.held.of(contexts)))
        progress(int(contexts[-1]) + 1, asked.contexts)
    return Ranks(np.concatenate(ranks), shown)


def _first(scores: np.ndarray) -> np.ndarray:
    """Return the pins that are among the first ten of any row."""
    count = min(CUTOFFS[0], scores.shape[1] - 1)
    best = np.argpartition(-scores, count, axis=1)[:, :count]
    found: np.ndarray = best[np.take_along_axis(scores, best, axis=1) > -np.inf]
    return found


def _ranks(scores: np.ndarray, number: np.ndarray, held: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ranks of held-out pins, some at a time."""
    pins = scores.shape[1]
    step = max(1, _SCORES_MAX // pins)
    position = np.arange(pins)
    for start in range(0, len(held), step):
        rows, own = scores[number[start : start + step]], held[start : start + step]
        score = rows[np.arange(len(own)), own][:, None]
        before = (rows > score) | ((rows == score) & (position < own[:, None]))
        yield np.where(score[:, 0] == -np.inf, NOWHERE, before.sum(axis=1))


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What one scorer finds.

    Attributes:
        recall: by cutoff, the mean over contexts of the share of their held-out pins among the first so many answers.
        mrr: the mean over contexts of 1 / the rank of the first held-out pin, counted from 1.
        slices: by the least number of known edges, the share of such held-out pins among the first 100 answers.
        coverage: share of the candidates that can be found.
        shown: share of the candidates that are among the first ten of any answer.
    """

    recall: dict[int, Estimate]
    mrr: Estimate
    slices: dict[int, Estimate]
    coverage: float
    shown: float


def retrieval(asked: Questions, found: Ranks, scorer: Scorer, seed: int = 0, resamples: int = RESAMPLES) -> Retrieval:
    """Summarise where the held-out pins are, with 95% intervals over contexts."""
    sums = _resampled(asked, found, seed, resamples)
    ones = sums[0]
    recall = {k: (sums[1 + i] / ones).estimate() for i, k in enumerate(CUTOFFS)}
    at = 2 + len(CUTOFFS)
    slices = {low: (sums[at + 2 * i] / sums[at + 1 + 2 * i]).estimate() for i, low in enumerate(SLICES)}
    coverage, shown = float(scorer.findable.mean()), float(found.shown.mean())
    return Retrieval(recall, (sums[at - 1] / ones).estimate(), slices, coverage, shown)


def recalls(asked: Questions, found: Ranks, cutoff: int) -> np.ndarray:
    """Return float64[C], the share of each context's held-out pins among its first `cutoff` answers."""
    number, _ = asked.held.of(np.arange(asked.contexts))
    count = np.bincount(number, found.ranks < cutoff, minlength=asked.contexts)
    return count / np.bincount(number, minlength=asked.contexts)


def recall_difference(
    asked: Questions, one: Ranks, other: Ranks, cutoff: int, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return by how much the recall of `one` is above that of `other`, relative to it, on the same resamples."""
    first, second = (_resampled(asked, ranks, seed, resamples)[1 + CUTOFFS.index(cutoff)] for ranks in (one, other))
    return ((first - second) / second).estimate()


def _resampled(asked: Questions, found: Ranks, seed: int, resamples: int) -> Resampling:
    """Resample contexts: 1; recall by cutoff; the reciprocal rank; for each slice, its pins found and all its pins."""
    contexts = np.arange(asked.contexts)
    number, held = asked.held.of(contexts)

    def of(values: np.ndarray) -> np.ndarray:
        return np.bincount(number, values, minlength=asked.contexts)

    best = np.full(asked.contexts, NOWHERE)
    np.minimum.at(best, number, found.ranks)
    columns = [np.ones(asked.contexts), *(recalls(asked, found, k) for k in CUTOFFS)]
    columns.append(np.where(best < NOWHERE, 1 / (1.0 + best), 0.0))
    sliced = np.searchsorted(SLICES, asked.counts[held], side="right") - 1
    for place in range(len(SLICES)):
        columns += [of((sliced == place) & (found.ranks < CUTOFFS[-1])), of(sliced == place)]
    return resample(contexts, np.stack(columns, axis=1), resamples, seed)


def most_popular(pins: np.ndarray, vectors: PinEmbeddings, count: int) -> list[int]:
    """Return the pins that occur most often in uint64[E], of those that have a vector."""
    found, counts = np.unique(pins, return_counts=True)
    counts = np.where(vectors.of(found).any(axis=1), counts, 0)
    order = np.lexsort((found, -counts))[:count]
    return [int(found[i]) for i in order if counts[i]]


def most_similar(vectors: PinEmbeddings, pin_id: int, count: int) -> list[tuple[int, float]]:
    """Return the pins whose vectors have the largest cosine with a pin's, and these.

    Raises:
        DatasetError: the pin has no vector.
    """
    own = vectors.of(np.array([pin_id], np.uint64)).astype(np.float32)[0]
    if not own.any():
        raise DatasetError(f"pin {pin_id} has no vector in {vectors.space.ref}")
    numbers = vectors.vectors.astype(np.float32)
    lengths = np.linalg.norm(numbers, axis=1)
    cosines = np.where(lengths > 0, numbers @ own / np.maximum(lengths, 1e-12) / np.linalg.norm(own), -np.inf)
    cosines[vectors.pin_ids == pin_id] = -np.inf
    order = np.lexsort((vectors.pin_ids, -cosines))[:count]
    return [(int(vectors.pin_ids[i]), float(cosines[i])) for i in order if cosines[i] > -np.inf]
