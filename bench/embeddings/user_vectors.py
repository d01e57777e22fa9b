"""Compare losses of networks of users (PinnerFormer), and one vector with a user's clusters.

`next`: each action predicts the next one. `all`: one of each sequence predicts all later ones. `dense`: each does.

A user asks with the first four fifths of the own actions, and should find the liked pins of the rest, among all pins
but those that the user has liked before. The networks learn from the first four fifths, too, are given the same vectors
of an SVD of these, and are the same but for their loss.

The 20 clusters answer with their own lists: for every held-out pin, an oracle chooses the cluster that finds it first.
So their recall@100 counts up to 2,000 answers, and that of one vector 100.

MovieLens-1M is downloaded. Taobao's sequences (47,703 users; the order of clicks, and no times) may not be passed on:
put taobao.txt, a line a user, into data/taobao-sequences, or name its folder in the environment variable
TAOBAO_SEQUENCES_DATA.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.lift import DATA, read_dataset
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from ranker.data import movielens
from ranker.data.actions import ActionLog, action_log
from ranker.data.embeddings import svd_embeddings
from ranker.data.users.interests import InterestSettings
from ranker.embedding.graph.edges import LogEdges, edges_in
from ranker.embedding.retrieval import (
    Ranks,
    Scorer,
    by_popularity,
    by_users,
    by_vectors,
    questions,
    ranked,
    ranked_by_best_interest,
    recall_difference,
    retrieval,
)
from ranker.embedding.users.fit import FitSettings
from ranker.embedding.users.model import train_users
from ranker.embedding.users.sequences import ordered_log
from ranker.embedding.users.user_vectors import daily_vectors, vectors_of_pins
from ranker.evaluation.bootstrap import Estimate

SEED, KNOWN, CUTOFFS = 7, 0.8, (10, 100)
LOSSES = ("next", "all", "dense")
TAOBAO = "taobao-sequences"


@dataclass(frozen=True, slots=True)
class Course:
    """Data, and the settings of its networks but for the loss."""

    name: str
    settings: FitSettings
    users_max: int


COURSES = (
    Course(movielens.NAME, FitSettings(seed=SEED, epochs=10, horizon_days=0.01, positives=16), 3_000),
    Course(TAOBAO, FitSettings(seed=SEED, epochs=3, horizon_actions=4), 5_000),
)
CAVEATS = (
    "what a ranker gains from the vectors (`user_lift`), or other horizons",
    "one training of each loss; the intervals are over users",
    "held-out pins that users would have liked had they seen them: they count as wrong",
)


def measure(*, quick: bool = False, courses: tuple[Course, ...] = COURSES, data: Path = DATA) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the data is missing."""
    raw: Raw = {"courses": {}, "seed": SEED}
    for course in courses:
        raw["courses"][course.name] = {}
        for found in _measured(course, _log(course.name, data), quick=quick):
            raw["courses"][course.name] = found
            yield raw


def _log(name: str, data: Path) -> ActionLog:
    if name != TAOBAO:
        return action_log(read_dataset(name, data))
    path = Path(os.environ.get("TAOBAO_SEQUENCES_DATA", data / TAOBAO)) / "taobao.txt"
    if not path.is_file():
        raise BenchmarkError(f"{path} is missing; put it there, or name its folder in TAOBAO_SEQUENCES_DATA")
    return ordered_log(edges_in(path))


def _measured(course: Course, log: ActionLog, *, quick: bool) -> Iterator[dict[str, Any]]:
    known, held = divided(log)
    asked = questions(LogEdges(known, None), LogEdges(held, None), (), 50 if quick else course.users_max, SEED)
    settings = course.settings.model_copy(update={"epochs": 1, "dim": 8, "length_max": 16} if quick else {})
    until_ms, timed = int(known.time_ms[-1]) + 1, course.name != TAOBAO
    given = svd_embeddings(known, until_ms, SEED, "bench")
    scorer = by_popularity(asked)
    ranks: dict[str, Ranks] = {"popularity": ranked(asked, scorer)}
    found: dict[str, Any] = {
        "users": asked.contexts,
        "asked": {"popularity": _recalls(asked, ranks["popularity"], scorer)},
    }
    for loss in LOSSES:
        model = train_users(known, given, until_ms, settings.model_copy(update={"loss": loss}), "bench", timed=timed)
        pins = vectors_of_pins(model, known.pin_ids, given)
        users = daily_vectors(model, known, given, until_ms, "bench")
        scorer = by_users(asked, users, pins)
        ranks[loss] = ranked(asked, scorer)
        found["asked"][loss] = _recalls(asked, ranks[loss], scorer)
        yield found
    clusters = InterestSettings(clusters_max=20, pins_max=len(log.pin_ids))  # none of a user's is left out
    for what, vectors in {"the SVD": given, "dense": pins}.items():
        scorer = by_vectors(asked, vectors)
        for name, answers in {
            f"the mean of the pins, {what}": ranked(asked, scorer),
            f"20 clusters of them, {what}": ranked_by_best_interest(asked, vectors, clusters),
        }.items():
            ranks[name] = answers
            found["asked"][name] = _recalls(asked, answers, scorer)
    yield found
    found["dense over next"] = _estimate(recall_difference(asked, ranks["dense"], ranks["next"], CUTOFFS[0], SEED))
    found["dense over clusters"] = _estimate(
        recall_difference(asked, ranks["dense"], ranks["20 clusters of them, the SVD"], CUTOFFS[1], SEED)
    )
    yield found


def divided(log: ActionLog) -> tuple[ActionLog, ActionLog]:
    """Return the first actions of every user, and the rest."""
    place = np.empty(len(log.user), np.int64)
    place[log.by_user] = np.arange(len(log.user)) - np.repeat(log.user_splits[:-1], np.diff(log.user_splits))
    first = place < np.ceil(KNOWN * np.diff(log.user_splits))[log.user]
    return _part(log, first), _part(log, ~first)


def _part(log: ActionLog, chosen: np.ndarray) -> ActionLog:
    user = log.user[chosen]
    splits = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(log.user_ids)))])
    return replace(
        log,
        user=user,
        pin=log.pin[chosen],
        time_ms=log.time_ms[chosen],
        labels=log.labels[chosen],
        action=log.action[chosen],
        by_user=np.argsort(user, kind="stable"),
        user_splits=splits,
    )


def _recalls(asked: Any, ranks: Ranks, scorer: Scorer) -> dict[str, Any]:
    found = retrieval(asked, ranks, scorer, SEED)
    return {str(cutoff): _estimate(found.recall[cutoff]) for cutoff in CUTOFFS}


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}


def conclude(raw: Raw) -> Conclusion:
    claims: list[Claim] = []
    summary: dict[str, float | None] = {}
    lines = ["| data | asked with | recall@10, 95% interval over users | recall@100 |", "|---|---|---|---|"]
    for name, course in raw["courses"].items():
        for what, recalls in course.get("asked", {}).items():
            lines.append(f"| {name} | {what} | {_shown(recalls['10'])} | {_shown(recalls['100'])} |")
            summary[f"{name}, {what}: recall@10"] = recalls["10"]["value"]
        if "dense over next" in course:
            more, most = course["dense over next"], course["dense over clusters"]
            claims += [
                Claim(f"{name}: recall@10 of dense over next", 100 * more["value"], 10.0, "%", "at_least"),
                Claim(f"{name}: recall@100 of one vector over 20 clusters", 100 * most["value"], 0.0, "%", "at_least"),
            ]
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")


def _shown(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
