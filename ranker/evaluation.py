"""How well bundles rank the requests of the test period, scored the way the server scores them.

Candidates are the pins acted on and uniformly drawn others. Popular pins are therefore easy to tell from drawn ones,
which helps the popularity baseline, and probabilities are relative to these candidates: among other ones they shift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table

from kernels.engine import EngineFactory
from model_store.bundle import EMBEDDINGS, Bundle, BundleError
from model_store.live import LiveModel, load_live
from ranker.actions import ActionLog
from ranker.embeddings import decode_embeddings
from ranker.errors import DatasetError
from ranker.examples import ExampleBuilder, Examples, Sampling
from ranker.metrics import TOP, auc, calibration_error, hit_at
from ranker.requests import Split

_REQUESTS_PER_RUN = 4


@dataclass(frozen=True, slots=True)
class HeadScore:
    """One scorer's quality on one head; `ece` is None where scores are no probabilities."""

    scorer: str
    head: str
    hit_at_3: float
    auc: float
    ece: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All scores, and what they were measured on."""

    requests: int
    rows: int
    seed: int
    scores: tuple[HeadScore, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def flat(self, scorer: str) -> dict[str, float]:
        """Return one scorer's metrics as `<metric>_<head>`."""
        found: dict[str, float] = {}
        for score in self.scores:
            if score.scorer == scorer:
                found[f"hit_at_3_{score.head}"] = round(score.hit_at_3, 4)
                found[f"auc_{score.head}"] = round(score.auc, 4)
                if score.ece is not None:
                    found[f"ece_{score.head}"] = round(score.ece, 4)
        return found


def evaluate(
    bundles: Mapping[str, Bundle],
    log: ActionLog,
    factory: EngineFactory,
    sampling: Sampling,
    seed: int,
    split: Split | None = None,
    progress: Callable[[str, int, int], None] = lambda _scorer, _done, _total: None,
) -> Evaluation:
    """Score the test requests with each bundle, and with each pin's popularity per action.

    Args:
        bundles: by the name to show; all over the same data.
        log: the history that holds the test period.
        factory: the engine to score with.
        sampling: of candidates.
        seed: of the drawn candidates; the same for every bundle.
        split: where the test period starts.
        progress: told a bundle's name, requests done and in all.

    Raises:
        BundleError: a bundle cannot be loaded, or carries no embeddings to build features from.
    """
    scores: list[HeadScore] = []
    requests = rows = 0
    for name, bundle in bundles.items():
        examples = _test_examples(bundle, log, sampling, seed, split or Split())
        heads = [head.name for head in bundle.manifest.heads]
        if not scores:
            requests, rows = examples.batch.requests, examples.batch.rows
            scores += _head_scores("popularity", heads, examples, examples.popularity, probabilities=False)
        live = load_live(bundle, factory, streams=1)
        try:
            predicted = _score(live, examples, lambda done, total, name=name: progress(name, done, total))  # type: ignore[misc]
        finally:
            live.engine.close()
        scores += _head_scores(name, heads, examples, predicted, probabilities=True)
    return Evaluation(requests, rows, seed, tuple(scores))


def table_of(evaluation: Evaluation) -> Table:
    """Return the evaluation as a table, one line per head and scorer, the best HIT@3 of a head in bold."""
    table = Table(
        title=f"{evaluation.requests:,} test requests, {evaluation.rows:,} rows",
        caption="Candidates: the pins acted on and uniformly drawn others; probabilities are relative to these.",
    )
    for column in ("head", "scorer"):
        table.add_column(column)
    for column in (f"HIT@{TOP}", "AUC", "ECE"):
        table.add_column(column, justify="right")
    for head in dict.fromkeys(score.head for score in evaluation.scores):
        mine = [score for score in evaluation.scores if score.head == head]
        best = max(score.hit_at_3 for score in mine)
        for score in mine:
            hit = f"{score.hit_at_3:.4f}"
            table.add_row(
                head,
                score.scorer,
                f"[bold]{hit}[/]" if score.hit_at_3 == best else hit,
                f"{score.auc:.4f}",
                "-" if score.ece is None else f"{score.ece:.4f}",
            )
        table.add_section()
    return table


def _test_examples(bundle: Bundle, log: ActionLog, sampling: Sampling, seed: int, split: Split) -> Examples:
    manifest = bundle.manifest
    if EMBEDDINGS not in bundle.files:
        raise BundleError(f"{manifest.ref} carries no {EMBEDDINGS}, so its features cannot be built; train it anew")
    try:
        embeddings = decode_embeddings(bundle.files[EMBEDDINGS])
        return ExampleBuilder(log, embeddings, manifest, split, sampling, seed).build("test")
    except (KeyError, ValueError, DatasetError) as error:
        raise BundleError(f"{manifest.ref}: cannot build its features from this data: {error}") from error


def _score(live: LiveModel, examples: Examples, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return float32[N, H] calibrated probabilities."""
    total = examples.batch.requests
    parts = []
    for start in range(0, total, _REQUESTS_PER_RUN):
        stop = min(start + _REQUESTS_PER_RUN, total)
        parts.append(live.probabilities(live.engine.run(examples.take(np.arange(start, stop)).batch)))
        progress(stop, total)
    return np.concatenate(parts)


def _head_scores(
    scorer: str, heads: Sequence[str], examples: Examples, values: np.ndarray, *, probabilities: bool
) -> list[HeadScore]:
    scores = []
    for column, head in enumerate(heads):
        value, labels = values[:, column], examples.labels[:, column]
        ece = calibration_error(value, labels) if probabilities else None
        hit = hit_at(value, labels, examples.batch.row_splits)
        scores.append(HeadScore(scorer, head, hit, auc(value, labels), ece))
    return scores
