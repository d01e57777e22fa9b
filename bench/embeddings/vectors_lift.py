"""Measure what vectors of pins are worth to a ranker: those of an SVD, or of a network over a growing graph (PinSage).

Both rankers have the same recipe, data, requests and candidates; only the vectors differ. Those of the SVD know the
events before the training's, and pins that are newer get the mean of those who acted on them. The network knows these
events, too, and makes vectors anew. Both do so at the start of each slice of time, as of which all other features are,
too. Where most events are on new pins, the slices are short, as with `pinrank embed follow`: in longer ones, most pins
that somebody acts on are new within the slice, and have no vector of either kind.

MovieLens-1M is downloaded. The other datasets must be in `data/NAME`; create them with
`pinrank data NAME SOURCE --out data/NAME`. Trained bundles and networks stay in `data/vectors_lift/`, where a second
run continues; delete that folder to start from scratch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.embeddings.producing import neighbourhoods_until
from bench.engines.lift import COURSES, Course, LiftPlan, Subject, read_dataset, train_subject
from bench.engines.lift import DATA as DATA_FOLDER
from bench.harness import Claim, Conclusion, Raw
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import read_bundle
from ranker.data.actions import ActionLog, action_log
from ranker.data.requests import Split, producer_until_ms
from ranker.embedding.pins.as_of import NetworkVectors
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.producer import train_producer
from ranker.embedding.pins.tasks import CO_SAVE
from ranker.embedding.pins.trained import TrainedPins, read_network, write_network
from ranker.embedding.pins.training import PinTraining
from ranker.evaluation.bootstrap import RESAMPLES
from ranker.evaluation.evaluate import evaluate
from ranker.training.examples import Sampling

SEED = 7
#: Of the network: small batches, as the logs have few users. Its vectors begin with those of the SVD.
SIZES = PinNetworkSettings(variant="pooled", dim=32, trained_dim=32, own_dropped=0.3, features_kept=True)
TRAINING = PinTraining(epochs_max=30, patience=4, batch=256, seed=SEED)


@dataclass(frozen=True, slots=True)
class Goal:
    """By how much a head's HIT@3 should rise, in percent; for `at_least` below 0, by how much it may fall."""

    head: str
    percent: float


#: What the table says nothing about.
CAVEATS = (
    "candidates other than a request's own pins are drawn at random, and easier to tell than those of a retrieval",
    "the intervals are over users, for one training of each ranker and network; other seeds give other rankers",
    "what users would have done with an order that nobody showed them",
)
GOALS = {"deskdrop": Goal("closeup", 15.0), "kuairand": Goal("long_view", 2.0), "ml-1m": Goal("save", -1.0)}
#: Of logs whose pins are mostly new.
OFTEN = Split(train_slices=480, validation_slices=240, test_slices=240)
SPLITS = {"deskdrop": OFTEN, "kuairand": OFTEN}
MEASURED = tuple(course for course in COURSES if course.name in GOALS)


def measure(
    *,
    quick: bool = False,
    courses: tuple[Course, ...] = MEASURED,
    data: Path = DATA_FOLDER,
    keep: Path = DATA_FOLDER / "vectors_lift",
    plan: LiftPlan | None = None,
) -> Iterator[Raw]:
    """Run the benchmark."""
    plan = plan or (
        LiftPlan(requests_max=40, newest_requests_max=40, test_requests_max=40, epochs=1) if quick else LiftPlan()
    )
    raw: Raw = {"courses": {}, "requests": plan.requests_max, "test_requests": plan.test_requests_max, "seed": SEED}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        for course in courses:
            folder = (Path(temporary) if quick else keep) / course.name
            raw["courses"][course.name] = _compared(course, plan, data, folder, quick=quick)
            yield raw


def _compared(course: Course, plan: LiftPlan, data: Path, folder: Path, *, quick: bool) -> Raw:
    """Train both rankers on a dataset, and return their HIT@3 by head."""
    dataset, split = read_dataset(course.name, data), SPLITS.get(course.name, Split())
    log = action_log(dataset)
    vectors = NetworkVectors.of(_network(log, folder, quick=quick))
    bundles = {}
    for number, (name, given) in enumerate({"svd": None, "network": vectors}.items(), start=1):
        path = folder / name
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            train_subject(course, Subject("late"), dataset, plan, SEED, number, path, given, split)
        bundles[name] = read_bundle(path)
    sampling = Sampling(requests_max=plan.test_requests_max)
    found = evaluate(
        bundles, log, OpenVinoEngine, sampling, SEED, split, baseline="svd", data=course.name,
        resamples=50 if quick else RESAMPLES, vectors=[vectors],
    )  # fmt: skip
    heads: dict[str, dict[str, Any]] = {}
    for score in found.scores:
        hit = score.hit_at_3_by_head
        if hit is not None and score.scorer in bundles:
            lift = hit.lift_percent
            own = {"hit": hit.mean.value, "auc": score.auc}
            if lift is not None:
                own |= {"lift_percent": lift.value, "low": lift.low, "high": lift.high}
            heads.setdefault(score.head, {})[score.scorer] = own
    return {"requests": found.requests, "users": found.users, "heads": heads}


def _network(log: ActionLog, folder: Path, *, quick: bool) -> TrainedPins:
    """Train a network on the events before those of the ranker, or read the one that is there."""
    path = folder / "network.npz"
    if path.exists():
        return read_network(path)
    until_ms = producer_until_ms(log, Split())
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        work = Path(temporary)
        graph, walks, joined = neighbourhoods_until(log, until_ms, work, SEED, 20 if quick else 200)
        training = PinTraining(epochs_max=1, batch=64) if quick else TRAINING
        trained = train_producer("bench", joined, graph, walks, CO_SAVE, work, SIZES, training)
    folder.mkdir(parents=True, exist_ok=True)
    write_network(path, trained)
    return trained


def conclude(raw: Raw) -> Conclusion:
    claims: list[Claim] = []
    summary: dict[str, float | None] = {}
    lines = [
        "| data | head | HIT@3 with an SVD | with a network | lift, 95% interval over users |",
        "|---|---|---|---|---|",
    ]
    for name, course in raw["courses"].items():
        for head, scorers in course["heads"].items():
            own, svd = scorers["network"], scorers["svd"]
            if own.get("lift_percent") is None:
                continue
            lift = f"{own['lift_percent']:+.1f}% [{own['low']:+.1f}, {own['high']:+.1f}]"
            lines.append(f"| {name} | {head} | {svd['hit']:.4f} | {own['hit']:.4f} | {lift} |")
            summary[f"{name}, {head}: HIT@3 with an SVD"] = svd["hit"]
            summary[f"{name}, {head}: HIT@3 with a network"] = own["hit"]
            goal = GOALS[name]
            if goal.head != head:
                continue
            what = f"{name}, {head}: HIT@3 over the recipe with an SVD"
            claims.append(Claim(what, own["lift_percent"], goal.percent, "%", "at_least"))
            if goal.percent > 0:
                claims.append(Claim(f"{what}, lower end of its interval", own["low"], 0.0, "%", "at_least"))
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")
