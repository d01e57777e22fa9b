"""Measure, on four real logs, how well each variant of the ranker ranks, against boosted trees, and what it costs.

Every variant is trained with default settings on about 5,000 requests of each dataset, the default one and the base
with two seeds, and evaluated on the newest tenth: by head against LightGBM with the same rows, and by utility against
the ranker without a sequence. One server serves the variants of a dataset. It answers one request at a time, for users
with their real sequences, and rotates the variants.

MovieLens-1M is downloaded. The other datasets must be in `data/NAME`; create them with
`pinrank data NAME SOURCE --out data/NAME`. Trained bundles stay in `data/lift/`, where a second run continues; delete
that folder to start from scratch.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.fusion_latency import BASE, DEFAULT, in_turn_ms, served
from bench.engines.lift_conclusions import CANDIDATES, conclude
from bench.harness import ROOT, BenchmarkError, Raw
from feature_client.stores.open_store import open_store
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import Bundle, read_bundle
from pinrank.channels import open_channel
from pinrank.v1 import ranking_pb2
from ranker.baselines.score import BaselinePlan
from ranker.cache_folder import default_cache_dir
from ranker.cli.console import ConsoleReporter
from ranker.data import movielens
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import embeddings_of
from ranker.data.features import Groups, fill_store
from ranker.data.requests import Split
from ranker.data.schema import ActionSchema
from ranker.data.users.rows import UserEncoder
from ranker.embedding.users.carried import encoders_in
from ranker.embedding.vector_file import GivenVectors
from ranker.evaluation.evaluate import evaluate
from ranker.recipe import make_bundle
from ranker.recipe_settings import Recipe
from ranker.training.examples import Sampling
from ranker.training.settings import TrainingConfig
from server.cli.console import console

__all__ = ["conclude", "measure"]

DATA = ROOT / "data"
SEEDS = (7, 8)


@dataclass(frozen=True, slots=True)
class Course:
    """A dataset, the same for all variants.

    Attributes:
        name: of the dataset.
        model: name of its models.
        save: the strongest action that a model predicts.
        utility: weights of the heads; None means the affinity of each action.
    """

    name: str
    model: str
    save: str
    utility: Path | None = None


COURSES = (
    Course("ml-1m", "ml1m", "save", ROOT / "deploy" / "demo" / "utility.toml"),
    Course("deskdrop", "deskdrop", "save"),
    Course("kuairand", "kuairand", "like"),
    Course("grocery", "grocery", "review"),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is compared: a variant, with or without other sizes."""

    variant: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    sequence_length: int | None = None
    #: The default variant and what it is compared with are trained twice.
    seeds: tuple[int, ...] = SEEDS[:1]
    #: Whether only the first dataset's requests train it.
    once: bool = False


SUBJECTS: Mapping[str, Subject] = {
    # It reads most actions, and so do the trees then.
    "published": Subject("published", once=True),
    BASE: Subject(BASE, seeds=SEEDS),
    DEFAULT: Subject(DEFAULT, seeds=SEEDS),
    "cross": Subject("cross"),
    "early": Subject("early"),
    "late_100_actions": Subject("late", sequence_length=100, once=True),
    "early_100_actions": Subject("early", sequence_length=100, once=True),
    "early_20_actions": Subject("early", sequence_length=20, once=True),
}


@dataclass(frozen=True, slots=True)
class LiftPlan:
    requests_max: int = 5_000
    #: Validation requests, of which every other one is learned from, too.
    newest_requests_max: int = 2_000
    test_requests_max: int = 4_000
    #: Of the training that is only timed, on the first dataset.
    timed_requests_max: int = 10_000
    epochs: int | None = None
    rounds: int = 30
    users: int = 40


QUICK = LiftPlan(
    requests_max=40, newest_requests_max=40, test_requests_max=40, timed_requests_max=40, epochs=1, rounds=1, users=2
)


def measure(
    *,
    quick: bool = False,
    courses: tuple[Course, ...] = COURSES,
    subjects: Mapping[str, Subject] = SUBJECTS,
    data: Path = DATA,
    keep: Path = DATA / "lift",
) -> Iterator[Raw]:
    """Train, evaluate and serve every subject on every dataset.

    Args:
        quick: use little data, and keep nothing.
        courses: the datasets.
        subjects: what to compare, by name; `base` is among them.
        data: folder of the datasets.
        keep: folder for the trained bundles.

    Raises:
        BenchmarkError: a dataset is missing; the message says how to create it.
    """
    plan = QUICK if quick else LiftPlan()
    raw: Raw = {"training_minutes": None}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        for course in courses:
            dataset = read_dataset(course.name, data)
            if raw["training_minutes"] is None:
                raw["training_minutes"] = _timed(course, dataset, plan, Path(temporary) / "timed")
                yield raw
            own = {name: subject for name, subject in subjects.items() if course == courses[0] or not subject.once}
            folders = trained(course, own, dataset, plan, Path(temporary) if quick else keep)
            log = action_log(dataset)
            evaluations = []
            for seed in SEEDS:
                bundles = {name: read_bundle(by_seed[seed]) for name, by_seed in folders.items() if seed in by_seed}
                if BASE not in bundles:
                    continue
                sampling = Sampling(requests_max=plan.test_requests_max)
                against = BaselinePlan(
                    Sampling(requests_max=plan.requests_max), newest_requests_max=plan.newest_requests_max
                )
                evaluation = evaluate(
                    bundles, log, OpenVinoEngine, sampling, SEEDS[0], Split(), baseline=BASE, against=against
                )
                evaluations.append(evaluation.as_json())
            first = {name: by_seed[SEEDS[0]] for name, by_seed in folders.items()}
            bundles = {name: read_bundle(folder) for name, folder in first.items()}
            spent_ms = latency_ms(first, bundles, log, plan)
            raw[course.name] = {"evaluations": evaluations, "latency_ms": spent_ms, "save": course.save}
            yield raw


def read_dataset(name: str, data: Path) -> AtomicDataset:
    """Read a dataset from its folder, or download MovieLens-1M. Raises BenchmarkError: the folder is missing."""
    folder = data / name
    if not folder.is_dir():
        if name != movielens.NAME:
            raise BenchmarkError(f"{folder} is missing; create it with `pinrank data {name} SOURCE --out {folder}`")
        folder = movielens.obtain(default_cache_dir())
    return read_atomic(folder)


def _timed(course: Course, dataset: AtomicDataset, plan: LiftPlan, folder: Path) -> float:
    """Return how many minutes the default variant takes to train, from the data to the bundle."""
    started_s = time.monotonic()
    train_subject(
        course, Subject(DEFAULT), dataset, replace(plan, requests_max=plan.timed_requests_max), SEEDS[0], 1, folder
    )
    return (time.monotonic() - started_s) / 60


def trained(
    course: Course, subjects: Mapping[str, Subject], dataset: AtomicDataset, plan: LiftPlan, keep: Path
) -> dict[str, dict[int, Path]]:
    """Return the bundle of each subject and seed, and train the missing ones."""
    folders: dict[str, dict[int, Path]] = {}
    # The demo's first models were versions 1 and 2.
    for number, (name, subject) in enumerate(subjects.items(), start=3):
        for seed in subject.seeds:
            folder = keep / course.name / f"{name}-{seed}"
            if not folder.is_dir():
                folder.parent.mkdir(parents=True, exist_ok=True)
                console(stderr=True).rule(f"{course.name}, {name}, seed {seed}")
                train_subject(course, subject, dataset, plan, seed, number, folder)
            folders.setdefault(name, {})[seed] = folder
    return folders


def train_subject(
    course: Course,
    subject: Subject,
    dataset: AtomicDataset,
    plan: LiftPlan,
    seed: int,
    number: int,
    folder: Path,
    vectors: GivenVectors | None = None,
    split: Split | None = None,
    users: UserEncoder | None = None,
) -> None:
    """Train a subject, on these vectors or on those of an SVD, and write its bundle into a new folder."""
    training = TrainingConfig(seed=seed)
    recipe = Recipe(
        name=course.model,
        version=number,
        dataset=course.model,
        command="python -m bench lift",
        utility_toml=course.utility.read_bytes() if course.utility else _utility(dataset.schema),
        variant=subject.variant,
        sequence_length=subject.sequence_length,
        sizes=dict(subject.sizes),
        split=split or Split(),
        sampling=Sampling(requests_max=plan.requests_max),
        training=training if plan.epochs is None else replace(training, epochs=plan.epochs),
        validation_requests_max=plan.newest_requests_max,
        test_requests_max=100,  # for the bundle's own lineage; the comparison builds its own
    )
    make_bundle(folder, dataset, recipe, ConsoleReporter(console(stderr=True)), vectors=vectors, users=users)


def _utility(schema: ActionSchema) -> bytes:
    """Return a utility table with the affinity of each action as its weight; actions without affinity count -1."""
    terms = [
        f"{rule.affinity:g} * {rule.name}" if rule.affinity else f"-1 * {rule.name}"
        for rule in schema.actions
        if rule.head
    ]
    table = f'weights = {{ pinner = 1.0 }}\nutilities = {{ pinner = "{" + ".join(terms)}" }}\n'
    return "\n".join(f"[surfaces.{surface}]\n{table}" for surface in ("home", "related")).encode()


def latency_ms(
    folders: Mapping[str, Path], bundles: Mapping[str, Bundle], log: ActionLog, plan: LiftPlan
) -> dict[str, list[float]]:
    """Return the latencies by variant, in milliseconds, of one client on this machine without other load.

    Args:
        folders: the bundles' folders, by variant.
        bundles: the same bundles, which read the same groups, or fewer.
        log: whose users ask, and whose features are served.
        plan: the number of rounds, and of users in each.
    """
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        folder = Path(temporary)
        store = f"lmdb://{folder / 'features'}"
        widest = max(bundles.values(), key=lambda one: (one.manifest.sequence_length, len(one.manifest.groups)))
        asyncio.run(_fill(store, widest, log))
        with served(folders, store, folder) as address, open_channel(address) as channel:
            requests = _requests(bundles, log, plan.users)
            milliseconds: dict[str, list[float]] = {variant: [] for variant in bundles}
            versions: dict[str, int] = {}
            for round_number in range(plan.rounds + 1):
                for variant, spent_ms in in_turn_ms(channel, requests, versions).items():
                    if round_number:  # the first round is a warm-up
                        milliseconds[variant] += spent_ms
    return milliseconds


async def _fill(address: str, bundle: Bundle, log: ActionLog) -> None:
    store = open_store(address)
    await store.start()
    embeddings = embeddings_of(bundle)
    await fill_store(store, log, embeddings, Groups.served_by(bundle.manifest, encoders_in([bundle])))
    await store.close()


def _requests(bundles: Mapping[str, Bundle], log: ActionLog, users: int) -> dict[str, list[ranking_pb2.RankRequest]]:
    """Return the same requests for every variant. Users are drawn as often as they act, as in real traffic."""
    rng = np.random.default_rng(SEEDS[0])
    asking = log.user_ids[rng.choice(log.user, users)]
    count = min(CANDIDATES, len(log.pin_ids))
    pins = [rng.choice(log.pin_ids, count, replace=False).tolist() for _ in asking]
    return {
        variant: [
            ranking_pb2.RankRequest(user_id=int(user), pin_ids=candidates, surface="home", label=variant)
            for user, candidates in zip(asking, pins, strict=True)
        ]
        for variant in bundles
    }
