"""Measure how well DCN-v2, DIN and SASRec rank on four real logs, beside our default variant and boosted trees.

Each of them is a small module after its paper. It learns from the requests that our networks of `lift` learn from, and
every scorer orders the same candidates of the same test requests. Where they deviate from the papers:

- Pins have our stored vectors, mapped linearly, beside ids of their own: many pins of a test are in no row
  that was learned from, and have no id.
- DCN-v2 reads the inputs of our networks as numbers: vectors, scalars and the surface, without similarities. So does
  the deep part of DIN.
- The sequences hold all kinds of action, so DIN and SASRec add a learned vector of the kind to that of the pin.
- SASRec has one body for all heads, and a linear map of its last state for each. It learns from the candidates of the
  requests, as all others do, not from the next action at every place.
- The sizes are for this little data, and the learning rate is chosen on held requests.

The bundles of our default variant are those that `lift` keeps in `data/lift/`; what is missing there is trained. The
datasets are those of `lift`, too. Where RecBole is installed in `.venv-recbole`, the parts of the modules are compared
with its own (see `recbole_parity.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.fusion_latency import DEFAULT
from bench.engines.lift import COURSES, DATA, QUICK, SEEDS, SUBJECTS, Course, LiftPlan, read_dataset, trained
from bench.harness import ROOT, BenchmarkError, Raw
from bench.rankers.fitting import PUBLISHED, Fitting, fit, logits_of
from bench.rankers.published_conclusions import conclude
from bench.rankers.rows import Rows
from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import PARAMETERS, Bundle, read_bundle
from ranker.baselines.score import BaselinePlan, training_rows
from ranker.baselines.scores import TREES
from ranker.data.actions import ActionLog, action_log
from ranker.data.requests import Split
from ranker.evaluation.bootstrap import RESAMPLES, Resampling, resample
from ranker.evaluation.metrics import hits, requests_with
from ranker.evaluation.scoring import ScoredTest, score_test
from ranker.network.model import RankerNetwork
from ranker.training.examples import Sampling
from ranker.training.parent import decode_parameters
from server.cli.console import console

__all__ = ["conclude", "measure"]

SEED = SEEDS[0]
_SPLIT = Split()


def measure(
    *,
    quick: bool = False,
    courses: tuple[Course, ...] = COURSES,
    data: Path = DATA,
    keep: Path = DATA / "lift",
    recbole_python: Path = ROOT / ".venv-recbole" / "bin" / "python",
) -> Iterator[Raw]:
    """Train and evaluate every published ranker on every dataset.

    Args:
        quick: use little data, and keep nothing.
        courses: the datasets.
        data: folder of the datasets.
        keep: folder of the bundles that `lift` trained.
        recbole_python: Python interpreter with RecBole; without it, nothing is compared with RecBole.

    Raises:
        BenchmarkError: a dataset is missing, or RecBole computes something else.
    """
    plan = QUICK if quick else LiftPlan()
    raw: Raw = {"recbole": _recbole(recbole_python), "datasets": {}}
    yield raw
    # Only the default variant has a seed; the others keep the numbers of the versions as they are in `lift`.
    subjects = {name: replace(subject, seeds=(SEED,) if name == DEFAULT else ()) for name, subject in SUBJECTS.items()}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        for course in courses:
            dataset = read_dataset(course.name, data)
            folders = trained(course, subjects, dataset, plan, Path(temporary) if quick else keep)
            raw["datasets"][course.name] = _measured(
                course.name, read_bundle(folders[DEFAULT][SEED]), action_log(dataset), plan
            )
            yield raw


def _measured(name: str, bundle: Bundle, log: ActionLog, plan: LiftPlan) -> dict[str, Any]:
    """Return what was measured on one dataset."""
    train, newest = Sampling(requests_max=plan.requests_max), plan.newest_requests_max
    sampling = Sampling(requests_max=plan.test_requests_max)
    against = BaselinePlan(train, newest_requests_max=newest, seed=SEED)
    test = score_test({DEFAULT: bundle}, log, OpenVinoEngine, sampling, SEED, _SPLIT, baselines=against)
    scores = {scorer: (scored.heads, scored.probabilities) for scorer, scored in _ours(test).items()}
    rows = Rows.of(bundle, log, train, Sampling(requests_max=newest), sampling, SEED)
    if not np.array_equal(rows.test.labels, test.labels):
        raise BenchmarkError(f"{name}: the published rankers would be judged on other candidates than `{DEFAULT}`")
    fitting = Fitting(seed=SEED)
    if plan.epochs is not None:
        fitting = replace(fitting, epochs=plan.epochs, epochs_of_rates=plan.epochs)
    learned = bundle.manifest.lineage.training_rows
    rankers: dict[str, dict[str, Any]] = {
        DEFAULT: {
            "parameters": _parameters(bundle),
            "same_rows": learned == training_rows(train, newest),
        }
    }
    for ranker, make in PUBLISHED.items():
        console(stderr=True).rule(f"{name}, {ranker}")
        fitted = fit(make, rows, fitting)
        scores[ranker] = (test.heads, logits_of(fitted.network, rows.test))
        rankers[ranker] = {
            "parameters": fitted.parameters,
            "seconds": fitted.seconds,
            "held_losses": {f"{rate:g}": losses for rate, losses in fitted.losses.items()},
        }
    return {
        "requests": len(test.users),
        "users": len(np.unique(test.users)),
        "without_history": int(np.count_nonzero(test.activity == 0)),
        "learned_requests": rows.learned.batch.requests,
        "unknown_share": float((rows.test.batch.candidate["pin_number"] == 0)[test.labels.any(axis=1)].mean()),
        "rankers": rankers,
        **_judged(test, scores),
    }


def _ours(test: ScoredTest) -> dict[str, Any]:
    trees = {TREES: test.baselines[TREES]} if TREES in test.baselines else {}
    return {**trees, **test.by_bundle}


def _judged(test: ScoredTest, scores: Mapping[str, tuple[tuple[str, ...], np.ndarray]]) -> dict[str, Any]:
    """Return HIT@3 by head of every scorer, and their relative differences in percent, with intervals over users.

    The order, the requests that count and the resamples are those of `ranker.evaluation`.
    """
    columns: list[np.ndarray] = []
    places: dict[tuple[str, str], int] = {}
    for scorer, (heads, found) in scores.items():
        for own, head in enumerate(heads):
            column = test.heads.index(head)
            places[scorer, head] = len(columns)
            columns.append(hits(found[:, own], test.labels[:, [column]], test.row_splits)[:, 0])
    counted = requests_with(test.labels, test.row_splits)
    sums = resample(test.users, np.stack([*columns, *counted.T], axis=1).astype(np.float64), RESAMPLES, SEED)
    means = {key: sums[place] / sums[len(columns) + test.heads.index(key[1])] for key, place in places.items()}
    return {
        "heads": dict(zip(test.heads, counted.sum(axis=0).tolist(), strict=True)),
        "hit_at_3": _nested({key: asdict(mean.estimate()) for key, mean in means.items()}),
        "over_percent": {
            rival: _nested(
                {
                    (scorer, head): asdict(_lift(mean, means[rival, head]).estimate())
                    for (scorer, head), mean in means.items()
                    if scorer != rival and (rival, head) in means
                }
            )
            for rival in (DEFAULT, TREES)
        },
    }


def _lift(own: Resampling, other: Resampling) -> Resampling:
    return ((own - other) / other).scaled(100)


def _nested(values: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (scorer, head), value in values.items():
        found.setdefault(scorer, {})[head] = value
    return found


def _parameters(bundle: Bundle) -> int:
    """Return the number of trainable parameters of a bundle of ours."""
    config, _ = decode_parameters(bundle.files[PARAMETERS])
    return sum(parameter.numel() for parameter in RankerNetwork(config).parameters())


def _recbole(python: Path) -> dict[str, Any] | None:
    """Return RecBole's version and the largest differences from its modules; None where it is not installed.

    Raises:
        BenchmarkError: the comparison failed.
    """
    if not python.exists():
        return None
    command = [str(python), "-m", "bench.rankers.recbole_parity"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise BenchmarkError(f"the comparison with RecBole failed: {ended.stderr[-2_000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found
