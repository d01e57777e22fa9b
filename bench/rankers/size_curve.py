"""Measure how much the default variant gains from more training requests, beside boosted trees on as many.

Each number of requests trains a network and trees of its own, which order the same candidates of the same test
requests. A number beyond what a dataset has takes all. The datasets are those of `lift` that have many requests.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.engines.fusion_latency import DEFAULT
from bench.engines.lift import COURSES, DATA, QUICK, SEEDS, SUBJECTS, Course, LiftPlan, read_dataset, trained
from bench.harness import Claim, Conclusion, Raw, markdown_table
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import read_bundle
from ranker.baselines.score import BaselinePlan
from ranker.baselines.scores import TREES
from ranker.data.actions import action_log
from ranker.data.atomic.recbole import AtomicDataset
from ranker.data.requests import Split
from ranker.evaluation.evaluate import evaluate
from ranker.training.examples import Sampling

SEED = SEEDS[0]
SIZES, QUICK_SIZES = (1_000, 3_000, 10_000, 30_000), (20, 40)
#: Those with so many training requests that the curve has four points.
LARGE = tuple(course for course in COURSES if course.name in {"ml-1m", "grocery"})


def measure(
    *,
    quick: bool = False,
    courses: tuple[Course, ...] = LARGE,
    data: Path = DATA,
) -> Iterator[Raw]:
    """Train and evaluate the default variant and the trees for every number of requests.

    Raises:
        BenchmarkError: a dataset is missing.
    """
    plan, sizes = (QUICK, QUICK_SIZES) if quick else (LiftPlan(), SIZES)
    raw: Raw = {}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        for course in courses:
            dataset = read_dataset(course.name, data)
            raw[course.name] = []
            for size in sizes:
                folder = Path(temporary) / str(size)
                raw[course.name].append(_measured(course, dataset, replace(plan, requests_max=size), folder))
                yield raw


def _measured(course: Course, dataset: AtomicDataset, plan: LiftPlan, folder: Path) -> dict[str, Any]:
    started_s = time.monotonic()
    subject = replace(SUBJECTS[DEFAULT], seeds=(SEED,))
    bundle = read_bundle(trained(course, {DEFAULT: subject}, dataset, plan, folder)[DEFAULT][SEED])
    minutes = (time.monotonic() - started_s) / 60
    against = BaselinePlan(
        Sampling(requests_max=plan.requests_max),
        plan.requests_max,
        newest_requests_max=plan.newest_requests_max,
        seed=SEED,
    )
    sampling = Sampling(requests_max=plan.test_requests_max)
    found = evaluate({DEFAULT: bundle}, action_log(dataset), OpenVinoEngine, sampling, SEED, Split(), against=against)
    by_head = {c.head: c.by_head for c in found.comparisons if c.baseline == TREES and c.by_head is not None}
    return {
        "asked": plan.requests_max,
        "requests": None if found.trees is None else found.trees.requests,
        "minutes": minutes,
        "heads": {
            head: {
                DEFAULT: paired.own.value,
                TREES: paired.baseline.value,
                "lift_percent": [paired.lift_percent.value, paired.lift_percent.low, paired.lift_percent.high],
            }
            for head, paired in by_head.items()
        },
    }


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float | None] = {}
    claims, tables = [], ["# HIT@3 by the number of training requests\n"]
    for name, points in raw.items():
        for point in points:
            summary[f"{name}, {point['asked']:,} requests: over {TREES}, mean of heads %"] = _over_trees(point)
        # A network that needs more data than trees to be as good would be of no use to who has little.
        claims.append(
            Claim(
                f"{name}: `{DEFAULT}` over {TREES} at {points[0]['asked']:,} requests, mean of heads",
                _over_trees(points[0]), 0.0, "%", "at_least",
            )
        )  # fmt: skip
        heads = list(points[-1]["heads"])
        rows = [
            [
                f"{point['requests'] or point['asked']:,}",
                scorer,
                *(_cell(point, head, scorer) for head in heads),
                f"{point['minutes']:.1f}" if scorer == DEFAULT else "-",
            ]
            for point in points
            for scorer in (DEFAULT, TREES)
        ]
        tables.append(markdown_table(name, ["requests", "ranker", *heads, "training, minutes"], rows))
    return Conclusion(summary, tuple(claims), "\n".join(tables))


def _over_trees(point: Mapping[str, Any]) -> float | None:
    lifts = [head["lift_percent"][0] for head in point["heads"].values() if head["lift_percent"][0] is not None]
    return sum(lifts) / len(lifts) if lifts else None


def _cell(point: Mapping[str, Any], head: str, scorer: str) -> str:
    found = point["heads"].get(head)
    if found is None or found[scorer] is None:
        return "-"
    value, low, high = found["lift_percent"]
    over = f" ({value:+.1f}% [{low:+.1f}, {high:+.1f}])" if scorer == DEFAULT and low is not None else ""
    return f"{found[scorer]:.3f}{over}"
