"""Time the clusters of users' pins (PinnerSage), and measure what more clusters find.

- How many users a core clusters in a second: 100 pins of 64 numbers each, the newest of a drawn log.
- MovieLens-1M, which is downloaded: users ask with the medoids of what they liked before the end of the window that
  `pinrank train` gives its producer of vectors, an SVD; what they liked later should be found among all movies. All
  clusters together have 100 answers; or each has 100, so that more clusters show more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.engines.lift import DATA, read_dataset
from bench.harness import Claim, Conclusion, Raw
from ranker.data.actions import ActionLog, action_log
from ranker.data.embeddings import svd_embeddings
from ranker.data.requests import Split, producer_until_ms
from ranker.data.users.interests import InterestSettings, interests_of
from ranker.embedding.graph.edges import LogEdges
from ranker.embedding.retrieval import (
    by_interests,
    by_vectors,
    questions,
    ranked,
    ranked_by_best_interest,
    recall_difference,
    retrieval,
)

SEED, CUTOFF = 7, 100
CLUSTERS = (1, 5, 20)
#: Pins and numbers of a user that is timed; users a second that a core should cluster.
PINS, DIM, USERS_PER_S_MIN = 100, 64, 500.0
CAVEATS = (
    "with a list for each cluster, more clusters can only find more, and cost as many more answers",
    "one dataset, one SVD; the intervals are over users",
)


def measure(*, quick: bool = False, data: Path = DATA, name: str = "ml-1m") -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the data is missing."""
    raw: Raw = {"users_per_s": _users_per_s(20 if quick else 2_000), "pins": PINS, "dim": DIM}
    yield raw
    log = action_log(read_dataset(name, data))
    until_ms = producer_until_ms(log, Split())
    raw |= _found(log, until_ms, 50 if quick else 2_000)
    yield raw


def _users_per_s(users: int) -> float:
    """Cluster drawn users, each around a few centres, one after the other."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((users, 8, DIM)).astype(np.float32)
    chosen = rng.integers(8, size=(users, PINS))
    vectors = centres[np.arange(users)[:, None], chosen] + 0.7 * rng.standard_normal((users, PINS, DIM)).astype(
        np.float32
    )
    ages_ms = np.sort(rng.integers(0, 90 * 86_400_000, (users, PINS)), axis=1)
    settings = InterestSettings()
    begun_s = time.perf_counter()
    for own, ages in zip(vectors, ages_ms, strict=True):
        interests_of(own, ages, settings)
    return users / (time.perf_counter() - begun_s)


def _found(log: ActionLog, until_ms: int, users_max: int) -> Raw:
    vectors = svd_embeddings(log, until_ms, SEED, "bench")
    asked = questions(LogEdges(log, until_ms), LogEdges(log, None, since_ms=until_ms), [vectors], users_max, SEED)
    scorers = {"the mean": by_vectors(asked, vectors)}
    for count in CLUSTERS:
        settings = InterestSettings(clusters_max=count, pins_max=256)
        scorers[f"{count} clusters"] = by_interests(asked, vectors, settings)
    ranks = {name: ranked(asked, scorer) for name, scorer in scorers.items()}
    for count in CLUSTERS[1:]:
        settings = InterestSettings(clusters_max=count, pins_max=256)
        name = f"{count} clusters, a list each"
        scorers[name], ranks[name] = scorers[f"{count} clusters"], ranked_by_best_interest(asked, vectors, settings)
    recalls = {name: retrieval(asked, ranks[name], scorer, SEED).recall[CUTOFF] for name, scorer in scorers.items()}
    over = recall_difference(asked, ranks["20 clusters"], ranks["5 clusters"], CUTOFF, SEED)
    return {
        "users": asked.contexts,
        "recall": {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in recalls.items()},
        "over": {"value": over.value, "low": over.low, "high": over.high},
    }


def conclude(raw: Raw) -> Conclusion:
    claims = [
        Claim(
            f"users a second on one core, {raw['pins']} pins of {raw['dim']} numbers",
            raw["users_per_s"], USERS_PER_S_MIN, "users/s", "at_least",
        )
    ]  # fmt: skip
    lines = [f"| asked with | recall@{CUTOFF}, 95% interval over users |", "|---|---|"]
    for name, one in raw["recall"].items():
        lines.append(f"| {name} | {one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}] |")
    over = raw["over"]
    claims.append(
        Claim(
            f"recall@{CUTOFF} of 20 clusters over 5, lower end of the interval", 100 * over["low"], 0.0, "%", "at_least"
        )
    )
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    summary = {f"{name}: recall@{CUTOFF}": one["value"] for name, one in raw["recall"].items()}
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")
