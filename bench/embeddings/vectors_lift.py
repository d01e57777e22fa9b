"""Measure what vectors of pins are worth to a ranker: of a short SVD, a long one, or a network over a growing graph.

The rankers have the same recipe, data, requests and candidates; only the vectors differ. Those of an SVD know the
events before the training's, and pins that are newer get the mean of those who acted on them. The network (PinSage)
knows these events, too, and makes vectors anew, which begin with those of the long SVD. All do so at the start of each
slice of time, as of which all other features are, too. Where most events are on new pins, the slices are short, as with
`pinrank embed follow`: in longer ones, most pins that somebody acts on are new within the slice, and have no vector of
any kind. Each ranker is trained three times, with other seeds: two trainings of one recipe can differ by more than the
kinds of vectors do.

MovieLens-1M is downloaded. The other datasets must be in `data/NAME`; create them with
`pinrank data NAME SOURCE --out data/NAME`. Trained bundles and networks stay in `data/vectors_lift/`, where a second
run continues; delete that folder to start from scratch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.embeddings.producing import neighbourhoods_until, svd_until
from bench.embeddings.several import compared
from bench.engines.lift import COURSES, Course, LiftPlan, Subject, read_dataset, train_subject
from bench.engines.lift import DATA as DATA_FOLDER
from bench.harness import Claim, Conclusion, Raw
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import Bundle, read_bundle
from ranker.data.actions import ActionLog, action_log
from ranker.data.embeddings import DIM
from ranker.data.requests import Split, producer_until_ms
from ranker.embedding.pins.as_of import NetworkVectors
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.producer import train_producer
from ranker.embedding.pins.tasks import CO_SAVE
from ranker.embedding.pins.trained import TrainedPins, read_network, write_network
from ranker.embedding.pins.training import PinTraining
from ranker.embedding.vector_file import GivenVectors, SavedVectors
from ranker.evaluation.bootstrap import RESAMPLES
from ranker.evaluation.scoring import score_test
from ranker.training.examples import Sampling

#: Of the trainings of each kind; the first is also that of the test's candidates.
SEEDS = (7, 8, 9)
#: The kinds of ranker. The first is what `pinrank train` makes.
KINDS = SVD, LONG, NETWORK = "svd", "long svd", "network"


@dataclass(frozen=True, slots=True)
class Length:
    """How long the long SVD's vectors are, and how many of their numbers all rankers of a dataset cross.

    Attributes:
        long_dim: numbers of a vector of the long SVD.
        crossed_dim: of `NetworkConfig`; the short SVD's 32 are all crossed.
    """

    long_dim: int
    crossed_dim: int


#: By the validation losses of a few trainings, and DeskDrop's also by this test (NOTES.md). KuaiRand's losses hardly
#: differ, and it has MovieLens-1M's lengths.
LENGTHS = {"deskdrop": Length(256, 0), "ml-1m": Length(64, 32), "kuairand": Length(64, 32)}
#: Of the network: small batches, as the logs have few users. Its vectors begin with those of the long SVD.
SIZES = PinNetworkSettings(variant="pooled", dim=32, trained_dim=32, own_dropped=0.3, features_kept=True)
TRAINING = PinTraining(epochs_max=30, patience=4, batch=256, seed=SEEDS[0])


@dataclass(frozen=True, slots=True)
class Goal:
    """By how much a head's HIT@3 should rise, in percent; for `at_least` below 0, by how much it may fall."""

    head: str
    percent: float


#: What the table says nothing about.
CAVEATS = (
    "candidates other than a request's own pins are drawn at random, and easier to tell than those of a retrieval",
    "the intervals are over users, for the mean of three rankers of each kind and one network; other seeds give others",
    "the gain on other days of DeskDrop: its length is the best of four in this test",
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
    seeds = SEEDS[:2] if quick else SEEDS
    raw: Raw = {
        "courses": {},
        "requests": plan.requests_max,
        "test_requests": plan.test_requests_max,
        "seeds": list(seeds),
    }
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        for course in courses:
            length = LENGTHS.get(course.name, Length(48, 32))
            folder = (Path(temporary) if quick else keep) / f"{course.name}-{length.long_dim}-{length.crossed_dim}"
            raw["courses"][course.name] = _compared(course, length, plan, data, folder, seeds, quick=quick)
            yield raw


def _compared(
    course: Course, length: Length, plan: LiftPlan, data: Path, folder: Path, seeds: tuple[int, ...], *, quick: bool
) -> Raw:
    """Train all kinds of ranker on a dataset, and return their HIT@3 by head."""
    dataset, split = read_dataset(course.name, data), SPLITS.get(course.name, Split())
    log = action_log(dataset)
    until_ms = producer_until_ms(log, Split())
    short, long = (svd_until(log, until_ms, SEEDS[0], dim) for dim in (DIM, length.long_dim))
    subject = Subject("late", {"crossed_dim": length.crossed_dim})
    network = NetworkVectors.of(_network(log, long, folder, quick=quick))
    kinds: dict[str, list[str]] = {}
    bundles: dict[str, Bundle] = {}
    given: dict[str, GivenVectors] = {SVD: short, LONG: long, NETWORK: network}
    for number, (kind, vectors) in enumerate(given.items(), start=1):
        kinds[kind] = [f"{kind.replace(' ', '-')}-{seed}" for seed in seeds]
        for seed, name in zip(seeds, kinds[kind], strict=True):
            path = folder / name
            if not path.is_dir():
                train_subject(course, subject, dataset, plan, seed, number, path, vectors, split)
            bundles[name] = read_bundle(path)
    sampling = Sampling(requests_max=plan.test_requests_max)
    test = score_test(bundles, log, OpenVinoEngine, sampling, SEEDS[0], split, vectors=list(given.values()))
    return {
        "requests": len(test.users),
        "users": len(np.unique(test.users)),
        "heads": compared(test, kinds, 50 if quick else RESAMPLES, SEEDS[0]),
    }


def _network(log: ActionLog, features: SavedVectors, folder: Path, *, quick: bool) -> TrainedPins:
    """Train a network on the events before those of the ranker, or read the one that is there."""
    path = folder / "network.npz"
    if path.exists():
        return read_network(path)
    until_ms = producer_until_ms(log, Split())
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        work = Path(temporary)
        graph, walks, joined = neighbourhoods_until(log, until_ms, work, features, 20 if quick else 200)
        training = PinTraining(epochs_max=1, batch=64) if quick else TRAINING
        trained = train_producer("bench", joined, graph, walks, CO_SAVE, work, SIZES, training)
    folder.mkdir(parents=True, exist_ok=True)
    write_network(path, trained)
    return trained


def _shown(kind: Raw) -> str:
    """Return the mean of a kind's trainings, each of them, and its lift over each kind before it."""
    hits = f"{kind['hit']:.4f} ({', '.join(f'{hit:.3f}' for hit in kind['hits'])})"
    return "; ".join([hits, *(_lift(over) for over in kind["over"].values())])


def _lift(over: Raw) -> str:
    if over["low"] is None:
        return "too few users"
    return f"{over['percent']:+.1f}% [{over['low']:+.1f}, {over['high']:+.1f}]"


def conclude(raw: Raw) -> Conclusion:
    claims: list[Claim] = []
    summary: dict[str, float | None] = {}
    lines = [
        "HIT@3: the mean of the trainings (each), and the lift over the kinds before with its 95% interval over users.",
        "",
        f"| data | head | {' | '.join(KINDS)} |",
        "|---|---|---|---|---|",
    ]
    for name, course in raw["courses"].items():
        for head, kinds in course["heads"].items():
            lines.append(f"| {name} | {head} | {' | '.join(_shown(kinds[kind]) for kind in KINDS)} |")
            summary |= {f"{name}, {head}: HIT@3 with the {kind}": kinds[kind]["hit"] for kind in KINDS}
        goal = GOALS[name]
        over = course["heads"].get(goal.head, {}).get(NETWORK, {}).get("over", {}).get(SVD, {})
        what = f"{name}, {goal.head}: HIT@3 with the network over the recipe with an SVD of {DIM} numbers"
        why = "too few users acted so in the test"
        claims.append(Claim(what, over.get("percent"), goal.percent, "%", "at_least", why))
        if goal.percent > 0:
            claims.append(Claim(f"{what}, lower end of its interval", over.get("low"), 0.0, "%", "at_least", why))
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")
