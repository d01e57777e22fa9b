"""Measure how old a user's vector may be, and what the loss of its network has to do with it.

KuaiRand: networks that have learned from the first five days make the vectors of users who like something on one of the
last two days, as of the beginning of that day and up to seven days earlier, but never from before the end of what they
have learned from. A vector should find the pins that the user likes on the day, among all pins. Two networks differ in
their loss only: each action predicts the next one, or all of the days that follow. Most pins of the last days are new.
So the networks know pins by given vectors only, those of an SVD, with newer ones folded in: of the pins to be found as
of the first of these days, and of a user's actions as of the vector.

Create the dataset with `pinrank data kuairand SOURCE --out data/kuairand`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.engines.lift import DATA, read_dataset
from bench.harness import Claim, Conclusion, Raw
from ranker.data.actions import ActionLog, action_log
from ranker.data.embeddings import svd_embeddings
from ranker.data.folding import folded_vectors
from ranker.embedding.retrieval import Questions, Ranks, by_users, questions, ranked, recall_difference, retrieval
from ranker.embedding.users.fit import FitSettings
from ranker.embedding.users.model import train_users
from ranker.embedding.users.user_vectors import user_vectors_at, vectors_of_pins
from ranker.embedding.vector_file import UserVectors, VectorsOrigin
from ranker.evaluation.bootstrap import Estimate

SEED, CUTOFFS = 7, (10, 100)
LEARNED_DAYS, AGES_DAYS, DAY_MS = 5, (0, 1, 2, 4, 7), 86_400_000
LOSSES = {
    "next": FitSettings(seed=SEED, table=False, loss="next"),
    "dense": FitSettings(seed=SEED, table=False, loss="dense", horizon_days=7.0),
}
CAVEATS = (
    "one training of each loss; the intervals are over days of users, of which one user may have several",
    "pins that nobody had acted on before the first of the days have no vector, and count as not found",
    "an older vector also knows less: the log begins twelve days before the first question",
)


@dataclass(frozen=True, slots=True)
class Days:
    """What users like on the days after those that networks learn from; each day of a user is a question.

    Attributes:
        users: int64[N], positions in the log's `user_ids`.
        begun_ms: int64[N], Unix time in milliseconds at which the day begins.
        held, known: the pins liked on the day, and those that the user had acted on before it.
    """

    users: np.ndarray
    begun_ms: np.ndarray
    held: ArrayEdges
    known: ArrayEdges


@dataclass(frozen=True, slots=True)
class ArrayEdges:
    """Edges in memory."""

    contexts: np.ndarray
    pins: np.ndarray
    until_ms: int | None = None

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield self.contexts, self.pins


def measure(*, quick: bool = False, data: Path = DATA, name: str = "kuairand") -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the data is missing."""
    log = action_log(read_dataset(name, data))
    day_ms = int(np.ptp(log.time_ms)) // 16 if quick else DAY_MS
    until_ms = int(log.time_ms[0]) + LEARNED_DAYS * day_ms
    since_ms = until_ms + max(AGES_DAYS) * day_ms
    asking = days_after(log, since_ms, day_ms)
    given = svd_embeddings(log, until_ms, SEED, "bench")
    raw: Raw = {"seed": SEED, "users": len(np.unique(asking.users)), "recall": {}, "aged": {}, "over": {}}
    ranks: dict[tuple[str, int], Ranks] = {}
    asked: Questions | None = None
    for loss, settings in LOSSES.items():
        smaller = {"epochs": 1, "dim": 8, "length_max": 16} if quick else {}
        model = train_users(log, given, until_ms, settings.model_copy(update=smaller), "bench")
        pins = vectors_of_pins(model, log.pin_ids, folded_vectors(log, given, since_ms))
        asked = asked or questions(asking.known, asking.held, [pins])
        ids = np.arange(len(asking.users), dtype=np.uint64)
        origin = VectorsOrigin(space=model.space, until_ms=None, entity="user")
        raw["asked"], raw["recall"][loss] = asked.contexts, {}
        for age in AGES_DAYS:
            vectors = np.zeros((len(ids), model.space.dim), np.float16)
            at_ms = asking.begun_ms - age * day_ms
            for day in np.unique(at_ms):
                own = np.flatnonzero(at_ms == day)
                known = folded_vectors(log, given, int(day))
                vectors[own] = user_vectors_at(model, log, known, asking.users[own], at_ms[own])
            scorer = by_users(asked, UserVectors(ids, vectors, origin), pins)
            ranks[loss, age] = ranked(asked, scorer)
            recall = retrieval(asked, ranks[loss, age], scorer, SEED).recall
            raw["recall"][loss][str(age)] = {str(cutoff): _estimate(recall[cutoff]) for cutoff in CUTOFFS}
        yield raw
    assert asked is not None  # noqa: S101 - there are losses
    for age in AGES_DAYS:
        dense = ranks["dense", age]
        raw["aged"][str(age)], raw["over"][str(age)] = (
            {str(cutoff): _estimate(recall_difference(asked, dense, other, cutoff, SEED)) for cutoff in CUTOFFS}
            for other in (ranks["dense", 0], ranks["next", age])
        )
    yield raw


def days_after(log: ActionLog, since_ms: int, day_ms: int) -> Days:
    """Return the days from `since_ms` on of every user who likes something on them."""
    liked = np.flatnonzero((log.time_ms >= since_ms) & (log.schema.affinities[log.action] > 0))
    days = (log.time_ms[liked] - since_ms) // day_ms
    stride = int(days.max(initial=0)) + 1
    asking, context = np.unique(log.user[liked] * stride + days, return_inverse=True)
    users, begun_ms = asking // stride, since_ms + asking % stride * day_ms
    contexts, pins = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for number, (user, begins_ms) in enumerate(zip(users, begun_ms, strict=True)):
        own = log.by_user[log.user_splits[user] : log.user_splits[user + 1]]
        own = own[log.time_ms[own] < begins_ms]
        contexts.append(np.full(len(own), number, np.uint64))
        pins.append(log.pin_ids[log.pin[own]])
    held = ArrayEdges(context.astype(np.uint64), log.pin_ids[log.pin[liked]])
    return Days(users, begun_ms, held, ArrayEdges(np.concatenate(contexts), np.concatenate(pins)))


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}


def _percent(one: Mapping[str, float | None]) -> str:
    value, low, high = (one[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "-"
    return f"{100 * value:+.0f}% [{100 * low:+.0f}, {100 * high:+.0f}]"


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float | None] = {}
    lines = [
        "| age of the vectors, days | recall@10, `dense` | over new ones | recall@100 | over new ones | over `next` |",
        "|---|---|---|---|---|---|",
    ]
    for age, over in raw["over"].items():
        cells = []
        for cutoff in ("10", "100"):
            recall = raw["recall"]["dense"][age][cutoff]["value"]
            cells += [f"{recall:.4f}", _percent(raw["aged"][age][cutoff]) if age != "0" else ""]
            of_loss = {loss: raw["recall"][loss][age][cutoff]["value"] for loss in LOSSES}
            summary |= {f"{loss}, {age} days old: recall@{cutoff}": value for loss, value in of_loss.items()}
        lines.append(f"| {age} | {' | '.join(cells)} | {_percent(over['100'])} |")
    claims: list[Claim] = []
    if raw["over"]:
        what = "vectors of the day before: recall@10 of dense over next"
        claims.append(Claim(what, 100 * (raw["over"]["1"]["10"]["value"] or 0.0), 10.0, "%", "at_least"))
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")
