"""Measure what the vector of a network of users (PinnerFormer) adds to a ranker of early fusion, and what it costs.

Both rankers have the same recipe, vectors of pins, data, requests and candidates; one also reads the vector. The
network learns from the events before the ranker's training. Vectors are as of the start of the slice of time that a
request is in, as in a batch. To tell why a lift is there or not, the same is measured with slices that are twenty times
shorter, and for a ranker that reads no actions by itself. One server serves both rankers of early fusion from one
feature store, and answers one request at a time, of either in turn.

MovieLens-1M is downloaded. The trained network and bundles stay in `data/user_lift/`, where a second run continues;
delete that folder to start from scratch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.embeddings.vectors_lift import OFTEN
from bench.engines.lift import COURSES, DATA, SEEDS, Course, LiftPlan, Subject, latency_ms, read_dataset, train_subject
from bench.harness import Claim, Conclusion, Raw
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import Bundle, read_bundle
from ranker.data.actions import ActionLog, action_log
from ranker.data.embeddings import svd_embeddings
from ranker.data.requests import Split, producer_until_ms
from ranker.embedding.users.encoder import ModelEncoder
from ranker.embedding.users.fit import FitSettings
from ranker.embedding.users.model import train_users
from ranker.embedding.users.network_file import read_network, write_network
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin
from ranker.evaluation.bootstrap import RESAMPLES
from ranker.evaluation.evaluate import evaluate
from ranker.training.examples import Sampling


@dataclass(frozen=True, slots=True)
class Case:
    """Rankers to compare, with and without the vector.

    Attributes:
        variant: of the rankers.
        split: how old features are, besides what is learned from.
        seeds: of the trainings.
    """

    variant: str
    split: Split
    seeds: tuple[int, ...]


WITHOUT, WITH = "without", "with"
#: The first is the one that the claims are about.
CASES = {
    "early": Case("early", Split(), SEEDS),
    "early, fresh": Case("early", OFTEN, SEEDS[:1]),
    "base": Case("base", Split(), SEEDS[:1]),
}
#: A user of this data rates most movies within an hour.
FIT = FitSettings(loss="dense", horizon_days=1.0, epochs=4)
LIFT_PERCENT_MIN, ADDED_MS_MAX = 2.0, 0.2
CAVEATS = (
    "the lift where users come back on many days, or have done more than a ranker's sequence holds",
    "candidates other than a request's own pins are drawn at random, and easier to tell than those of a retrieval",
    "the intervals are over users, for one training each; the seeds show how trainings differ",
)


def measure(
    *,
    quick: bool = False,
    course: Course = COURSES[0],
    data: Path = DATA,
    keep: Path = DATA / "user_lift",
    plan: LiftPlan | None = None,
) -> Iterator[Raw]:
    """Run the benchmark."""
    plan = plan or (
        LiftPlan(requests_max=40, newest_requests_max=40, test_requests_max=40, epochs=1, rounds=1, users=2)
        if quick
        else LiftPlan()
    )
    cases = {"early": replace(CASES["early"], seeds=SEEDS[:1])} if quick else CASES
    raw: Raw = {"requests": plan.requests_max, "save": course.save, "heads": {}, "latency_ms": {}}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        folder = Path(temporary) / course.name if quick else keep / course.name
        dataset = read_dataset(course.name, data)
        log = action_log(dataset)
        vectors = _pins(log, course)
        encoder = ModelEncoder(read_network(_network(log, vectors, folder, quick=quick)))
        folders: dict[str, Path] = {}
        for what, case, seed in [(name, one, seed) for name, one in cases.items() for seed in one.seeds]:
            own = {name: folder / f"{what.replace(', ', '-')}-{name}-{seed}" for name in (WITHOUT, WITH)}
            for number, (name, path) in enumerate(own.items(), start=1):
                if not path.is_dir():
                    given = vectors, case.split, encoder if name == WITH else None
                    train_subject(course, Subject(case.variant), dataset, plan, seed, number, path, *given)
            bundles = {name: read_bundle(path) for name, path in own.items()}
            heads = _found(bundles, log, encoder, plan, case.split, quick=quick)
            raw["heads"].setdefault(what, {})[str(seed)] = heads
            folders = folders or own
            yield raw
        raw["latency_ms"] = latency_ms(folders, {name: read_bundle(path) for name, path in folders.items()}, log, plan)
        yield raw


def _pins(log: ActionLog, course: Course) -> SavedVectors:
    """Return the vectors of pins that both rankers and the network read."""
    until_ms = producer_until_ms(log, Split())
    vectors = svd_embeddings(log, until_ms, SEEDS[0], course.model)
    return SavedVectors(vectors, VectorsOrigin(space=vectors.space, until_ms=until_ms))


def _network(log: ActionLog, vectors: SavedVectors, folder: Path, *, quick: bool) -> Path:
    """Return the file of the network, which is trained if it is not there."""
    path = folder / "network.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        settings = FIT.model_copy(update={"epochs": 1, "dim": 8}) if quick else FIT
        write_network(path, train_users(log, vectors.embeddings, producer_until_ms(log, Split()), settings, "bench"))
    return path


def _found(
    bundles: dict[str, Bundle], log: ActionLog, encoder: ModelEncoder, plan: LiftPlan, split: Split, *, quick: bool
) -> dict[str, Any]:
    """Return HIT@3 without and with the vector, and the lift, by head."""
    sampling = Sampling(requests_max=plan.test_requests_max)
    found = evaluate(
        bundles, log, OpenVinoEngine, sampling, SEEDS[0], split, baseline=WITHOUT,
        resamples=50 if quick else RESAMPLES, encoders=[encoder],
    )  # fmt: skip
    heads: dict[str, Any] = {}
    for score in found.scores:
        hit = score.hit_at_3_by_head
        if hit is None or score.scorer not in bundles:
            continue
        own = heads.setdefault(score.head, {})
        own[score.scorer] = hit.mean.value
        if hit.lift_percent is not None:
            lift = hit.lift_percent
            own["lift_percent"] = {"value": lift.value, "low": lift.low, "high": lift.high}
    return heads


def conclude(raw: Raw) -> Conclusion:
    save, summary = raw["save"], {}
    lines = ["| ranker, seed | head | HIT@3 without | with | lift, 95% interval over users |", "|---|---|---|---|---|"]
    for what, seed, heads in ((what, *one) for what, of_case in raw["heads"].items() for one in of_case.items()):
        for head, one in heads.items():
            lift = one.get("lift_percent")
            if lift is None or lift["value"] is None:
                continue
            shown = f"{lift['value']:+.1f}% [{lift['low']:+.1f}, {lift['high']:+.1f}]"
            lines.append(f"| {what}, {seed} | {head} | {one[WITHOUT]:.4f} | {one[WITH]:.4f} | {shown} |")
            summary[f"{what}, seed {seed}, {head}: lift of HIT@3, percent"] = lift["value"]
    found = [heads[save].get("lift_percent", {}) for heads in raw["heads"]["early"].values()]
    lifts = [one for one in found if one.get("value") is not None]
    claims: list[Claim] = []
    if lifts:
        mean, low = float(np.mean([one["value"] for one in lifts])), min(one["low"] for one in lifts)
        claims = [
            Claim(f"{save}: lift of HIT@3, mean of the seeds", mean, LIFT_PERCENT_MIN, "%", "at_least"),
            Claim(f"{save}: lift of HIT@3, lowest end of an interval", low, 0.0, "%", "at_least"),
        ]
    if raw["latency_ms"]:
        medians = {name: float(np.median(raw["latency_ms"][name])) for name in (WITHOUT, WITH)}
        added_ms = medians[WITH] - medians[WITHOUT]
        claims.append(Claim("P50 of an answer, added by the vector", added_ms, ADDED_MS_MAX, "ms", "at_most"))
        lines += ["", f"P50 of an answer: {medians[WITHOUT]:.2f} ms without, {medians[WITH]:.2f} ms with the vector."]
        summary |= {f"P50 {name}, ms": value for name, value in medians.items()}
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")
