"""Measure, on real logs, the lift of each variant of the ranker by head, and its serving latency.

The variants of a dataset are trained on the same requests, evaluated on the newest tenth, and served by one server. It
answers one request at a time, for users with their real sequences, and rotates the variants.

MovieLens-1M is downloaded. The other datasets must be in `data/NAME`; create them with
`pinrank data NAME SOURCE --out data/NAME`. Trained bundles stay in `data/lift/`, where a second run continues; delete
that folder to start from scratch.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from bench.engines.fusion_latency import BASE, SUBJECT, in_turn_ms, served
from bench.harness import ROOT, BenchmarkError, Claim, Conclusion, Raw, markdown_table
from feature_client.stores.open_store import open_store
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import EMBEDDINGS, Bundle, read_bundle
from pinrank.channels import open_channel
from pinrank.v1 import ranking_pb2
from ranker.cache_folder import default_cache_dir
from ranker.cli.console import ConsoleReporter
from ranker.data import movielens
from ranker.data.actions import ActionLog, action_log
from ranker.data.embeddings import decode_embeddings
from ranker.data.features import Groups, fill_store
from ranker.data.recbole import AtomicDataset, read_atomic
from ranker.data.requests import Split
from ranker.data.schema import ActionSchema
from ranker.evaluation.evaluate import evaluate
from ranker.evaluation.results import Evaluation, Hit
from ranker.network.variants import VARIANTS
from ranker.recipe import make_bundle
from ranker.recipe_settings import Recipe
from ranker.training.examples import Sampling
from ranker.training.settings import TrainingConfig
from server.cli.console import console

DATA = ROOT / "data"
CANDIDATES = 128
#: Published for early-fused real-time activity: its lift of saves, and the latency that it may add.
LIFT_PERCENT, LATENCY_PERCENT = 9.0, 20.0
SEED = 7


@dataclass(frozen=True, slots=True)
class Course:
    """The training settings of a dataset, the same for all its variants."""

    name: str
    #: Name of its models.
    model: str
    #: The head that corresponds to the published save.
    save: str
    training: TrainingConfig
    #: Negatives per training request: few, because rows of the early-fused variant are expensive to train on.
    negatives: int = 12
    #: Weights of the heads; None means the affinity of each action.
    utility: Path | None = None
    test_requests_max: int = 4_000


COURSES = (
    # Users rate films for minutes at a time: a time window of hours would hide a whole session.
    Course(
        "ml-1m",
        "ml1m",
        "save",
        TrainingConfig(seed=SEED, epochs=3, time_window_h_max=0.0),
        negatives=8,
        utility=ROOT / "deploy" / "demo" / "utility.toml",
    ),
    Course("deskdrop", "deskdrop", "save", TrainingConfig(seed=SEED, epochs=6, patience=2, time_window_share=0.5)),
    Course("kuairand", "kuairand", "like", TrainingConfig(seed=SEED, epochs=4, time_window_share=0.5)),
)


@dataclass(frozen=True, slots=True)
class LiftPlan:
    requests_max: int | None = None
    epochs: int | None = None
    rounds: int = 30
    users: int = 40


QUICK = LiftPlan(requests_max=40, epochs=1, rounds=1, users=2)


def measure(
    *,
    quick: bool = False,
    courses: tuple[Course, ...] = COURSES,
    variants: tuple[str, ...] = tuple(VARIANTS),
    data: Path = DATA,
    keep: Path = DATA / "lift",
) -> Iterator[Raw]:
    """Train, evaluate and serve every variant on every dataset.

    Args:
        quick: use little data, and keep nothing.
        courses: the datasets and their settings.
        variants: the variants to compare, the base first.
        data: folder of the datasets.
        keep: folder for the trained bundles.

    Raises:
        BenchmarkError: a dataset is missing; the message says how to create it.
    """
    plan = QUICK if quick else LiftPlan()
    raw: Raw = {}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        for course in courses:
            dataset = _dataset(course.name, data)
            folders = _trained(course, variants, dataset, plan, Path(temporary) if quick else keep)
            bundles = {variant: read_bundle(folder) for variant, folder in folders.items()}
            log = action_log(dataset)
            sampling = Sampling(requests_max=plan.requests_max or course.test_requests_max)
            evaluation = evaluate(bundles, log, OpenVinoEngine, sampling, SEED, Split(), baseline=BASE)
            latency_ms = _latency(folders, bundles, log, plan)
            raw[course.name] = {"evaluation": evaluation.as_json(), "latency_ms": latency_ms, "save": course.save}
            yield raw


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float] = {}
    claims: list[Claim] = []
    tables = ["# What each variant brings over the base, and what it costs\n"]
    for name, measured in raw.items():
        evaluation = TypeAdapter(Evaluation).validate_python(measured["evaluation"])
        told, made = _concluded(name, measured["save"], evaluation, measured["latency_ms"])
        summary |= told
        claims += made
        tables.append(_table(name, evaluation, measured["latency_ms"]))
    return Conclusion(summary, tuple(claims), "\n".join(tables))


def _dataset(name: str, data: Path) -> AtomicDataset:
    folder = data / name
    if not folder.is_dir():
        if name != movielens.NAME:
            raise BenchmarkError(f"{folder} is missing; create it with `pinrank data {name} SOURCE --out {folder}`")
        folder = movielens.obtain(default_cache_dir())
    return read_atomic(folder)


def _trained(
    course: Course, variants: tuple[str, ...], dataset: AtomicDataset, plan: LiftPlan, keep: Path
) -> dict[str, Path]:
    """Return the bundle of each variant, and train the missing ones."""
    progress = console(stderr=True)
    folders = {}
    # The demo's first models were versions 1 and 2.
    for number, variant in enumerate(variants, start=3):
        folder = keep / course.name / variant
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            progress.rule(f"{course.name}, {variant}")
            training = replace(course.training, epochs=plan.epochs or course.training.epochs)
            recipe = Recipe(
                name=course.model,
                version=number,
                dataset=course.model,
                command="python -m bench lift",
                utility_toml=course.utility.read_bytes() if course.utility else _utility(dataset.schema),
                variant=variant,
                sampling=Sampling(course.negatives, requests_max=plan.requests_max),
                training=training,
                validation_requests_max=plan.requests_max or 600,
                test_requests_max=plan.requests_max or 2_000,
            )
            make_bundle(folder, dataset, recipe, ConsoleReporter(progress))
        folders[variant] = folder
    return folders


def _utility(schema: ActionSchema) -> bytes:
    """Return a utility table with the affinity of each action as its weight; actions without affinity count -1."""
    terms = [
        f"{rule.affinity:g} * {rule.name}" if rule.affinity else f"-1 * {rule.name}"
        for rule in schema.actions
        if rule.head
    ]
    table = f'weights = {{ pinner = 1.0 }}\nutilities = {{ pinner = "{" + ".join(terms)}" }}\n'
    return "\n".join(f"[surfaces.{surface}]\n{table}" for surface in ("home", "related")).encode()


def _latency(
    folders: Mapping[str, Path], bundles: Mapping[str, Bundle], log: ActionLog, plan: LiftPlan
) -> dict[str, list[float]]:
    """Return the latencies by variant, in milliseconds, of one client on this machine without other load."""
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        folder = Path(temporary)
        store = f"lmdb://{folder / 'features'}"
        # All variants read the same groups, except that the base reads no sequence.
        widest = max(bundles.values(), key=lambda bundle: bundle.manifest.sequence_length)
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
    embeddings = decode_embeddings(bundle.files[EMBEDDINGS])
    await fill_store(store, log, embeddings, Groups.served_by(bundle.manifest))
    await store.close()


def _requests(bundles: Mapping[str, Bundle], log: ActionLog, users: int) -> dict[str, list[ranking_pb2.RankRequest]]:
    """Return the same requests for every variant. Users are drawn as often as they act, as in real traffic."""
    rng = np.random.default_rng(SEED)
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


def _concluded(
    name: str, save: str, evaluation: Evaluation, latency_ms: Mapping[str, list[float]]
) -> tuple[dict[str, float], list[Claim]]:
    """Return the summary of one dataset, and its claims."""
    summary: dict[str, float] = {}
    base_ms = float(np.median(latency_ms[BASE]))
    for variant, measured in latency_ms.items():
        median_ms = float(np.median(measured))
        summary[f"{name}, {variant}, latency P50 ms"] = median_ms
        summary[f"{name}, {variant}, latency over base %"] = 100 * (median_ms / base_ms - 1)
    lifts = {}
    for score in evaluation.scores:
        for order, hit in (("by utility", score.hit_at_3_by_utility), ("by head", score.hit_at_3_by_head)):
            lift = None if hit is None else hit.lift_percent
            if score.scorer not in latency_ms or lift is None or lift.value is None:
                continue
            lifts[score.scorer, score.head, order] = lift.value
            summary[f"{name}, {score.scorer}, HIT@3 {score.head} {order} over base %"] = lift.value
    claims = [
        Claim(
            f"{name}: HIT@3 {save} by head, {SUBJECT} over {BASE}",
            lifts.get((SUBJECT, save, "by head"), 0.0), LIFT_PERCENT, "%", "at_least",
        ),
        Claim(
            f"{name}: HIT@3 {save} by utility, {SUBJECT} over {BASE}",
            lifts.get((SUBJECT, save, "by utility"), 0.0), LIFT_PERCENT, "%", "at_least",
        ),
        Claim(
            f"{name}: latency, {SUBJECT} over {BASE}",
            summary[f"{name}, {SUBJECT}, latency over base %"], LATENCY_PERCENT, "%", "at_most",
        ),
    ]  # fmt: skip
    return summary, claims


def _table(name: str, evaluation: Evaluation, latency_ms: Mapping[str, list[float]]) -> str:
    """Return the table of one dataset: HIT@3, its lift with a 95% interval, and the latency."""
    heads = list(dict.fromkeys(score.head for score in evaluation.scores))
    text = ""
    for order, attribute in (
        ("each head's own order", "hit_at_3_by_head"),
        ("the utility's order", "hit_at_3_by_utility"),
    ):
        lines = []
        base_ms = float(np.median(latency_ms[BASE]))
        for variant, measured in latency_ms.items():
            hits = {s.head: getattr(s, attribute) for s in evaluation.scores if s.scorer == variant}
            median_ms = float(np.median(measured))
            cells = [VARIANTS[variant].description, *(_hit_cell(hits.get(head)) for head in heads)]
            lines.append([f"`{variant}`", *cells, f"{median_ms:.2f} ms, {100 * (median_ms / base_ms - 1):+.0f}%"])
        title = f"{name}: HIT@3 in {order}, {evaluation.requests:,} requests"
        text += markdown_table(title, ["variant", "", *heads, f"P50 of {CANDIDATES} candidates"], lines) + "\n"
    return text


def _hit_cell(hit: Hit | None) -> str:
    if hit is None or hit.mean.value is None:
        return "-"
    lift = hit.lift_percent
    if lift is None or lift.value is None:
        return f"{hit.mean.value:.3f}"
    interval = "" if lift.low is None or lift.high is None else f" [{lift.low:+.1f}, {lift.high:+.1f}]"
    return f"{hit.mean.value:.3f}, {lift.value:+.1f}%{interval}"
