"""A hand-made scored test period, to test the evaluation and the report without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import Bundle
from model_store.bundle.manifest import Manifest
from ranker.data.actions import RATINGS, action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import space_of
from ranker.evaluation.evaluate import evaluate
from ranker.evaluation.results import Evaluation
from ranker.evaluation.scoring import BundleScores, ScoredTest
from ranker.export.manifest import draft_manifest
from ranker.training.examples import Sampling
from tests.ranker.interactions import write_atomic

HEADS = ("save", "hide", "like")
CANDIDATES = 6


def scored_test(**changes: Any) -> ScoredTest:
    """Return 40 scored requests of six candidates, by ten users with 0, 15 or 200 actions; no candidate is liked.

    The bundle `good` ranks saved candidates first, `bad` ranks them last.
    """
    rng = np.random.default_rng(12)
    requests = 40
    labels = np.zeros((requests * CANDIDATES, 3), np.float32)
    for request in range(requests):
        start = request * CANDIDATES
        labels[start + rng.choice(CANDIDATES, 2, replace=False), 0] = 1
        labels[start + rng.integers(CANDIDATES), 1] = request % 4 == 0
    noise = rng.random(labels.shape).astype(np.float32)
    good = np.clip(0.6 * labels + 0.3 * noise, 0, 1)
    bad = np.clip(0.9 - good, 0, 1)
    fields: dict[str, Any] = {
        "heads": HEADS,
        "labels": labels,
        "popularity": np.round(10 * noise),
        "row_splits": np.arange(0, len(labels) + 1, CANDIDATES, dtype=np.int32),
        "users": np.arange(requests) % 10,
        "activity": np.array([0, 15, 15, 200])[np.arange(requests) % 4],
        "by_bundle": {
            "good": BundleScores(HEADS, good, good[:, 0] - good[:, 1], None),
            "bad": BundleScores(HEADS, bad, bad[:, 0] - bad[:, 1], None),
        },
    }
    return ScoredTest(**{**fields, **changes})


def bundles_of(test: ScoredTest) -> Mapping[str, Bundle]:
    """Return bundles with a manifest and no files."""
    return {
        name: Bundle(manifest(scored.heads), b"", "0123456789abcdef", {}) for name, scored in test.by_bundle.items()
    }


def manifest(heads: tuple[str, ...] = HEADS, *, sequence: bool = True) -> Manifest:
    return draft_manifest("toy", space_of("toy"), RATINGS, heads, sequence_length=100 if sequence else 0)


def measured(test: ScoredTest, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Evaluation:
    """Evaluate a test that is already scored."""
    log = action_log(read_atomic(write_atomic(folder, per_user=10)))
    monkeypatch.setattr("ranker.evaluation.evaluate.score_test", lambda *_arguments: test)
    options = {"data": "toy data", "resamples": 200, **options}
    return evaluate(bundles_of(test), log, NumpyEngine, Sampling(candidates=CANDIDATES), 3, **options)
