"""The whole way from a dataset to a bundle: embeddings, examples, training, calibration, export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from kernels.openvino_engine import OpenVinoEngine
from model_store.bundle import Bundle, read_bundle
from model_store.manifest import Calibration, Lineage
from ranker.actions import ActionLog, action_log
from ranker.atomic import AtomicDataset
from ranker.calibration import fit_calibration
from ranker.contract import draft_manifest
from ranker.embeddings import PinEmbeddings, space_of, svd_embeddings
from ranker.evaluation import evaluate
from ranker.examples import ExampleBuilder, Examples, Sampling
from ranker.export import BundleParts, export_bundle
from ranker.features import SURFACES, scalar_names
from ranker.golden import golden_inputs
from ranker.model import NetworkConfig, RankerNetwork
from ranker.requests import Part, Split, producer_until_ms
from ranker.training import Epoch, TrainingConfig, predict, train

Progress = Callable[[int, int], None]


class Reporter(Protocol):
    """What is told how far the recipe has come."""

    def step(self, what: str) -> AbstractContextManager[Progress]:
        """Enter a step; the function it gives is told how much is done and how much there is."""

    def note(self, message: str) -> None:
        """Say something worth reading afterwards."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what comes out, beside the data."""

    name: str
    version: int
    #: Names the embedding space; models over one store of features share it.
    dataset: str
    command: str
    utility_toml: bytes
    sequence: bool = True
    parent: str | None = None
    split: Split = field(default_factory=Split)
    sampling: Sampling = field(default_factory=Sampling)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    #: Requests to stop and calibrate on, and to measure the lineage's metrics on.
    validation_requests_max: int = 2_000
    test_requests_max: int = 2_000


def make_bundle(folder: Path, dataset: AtomicDataset, recipe: Recipe, report: Reporter) -> Bundle:
    """Train on a dataset and write the bundle into a folder that does not exist yet.

    Raises:
        DatasetError: the data holds too little to learn from.
        ParityError: an engine does not compute what was trained.
    """
    log = action_log(dataset)
    for head in log.schema.heads:
        if head not in log.heads:
            report.note(f"no interaction is a {head}: the model gets no such head")
    with report.step("embeddings"):
        embeddings = svd_embeddings(log, producer_until_ms(log, recipe.split), recipe.training.seed)
    network, calibrations = _learn(log, embeddings, recipe, report)
    parts = _bundle_parts(dataset, log, embeddings, calibrations, recipe)
    # Metrics are measured on a bundle, so the bundle is made twice: to be measured, and with what was measured.
    with report.step("test"), tempfile.TemporaryDirectory() as temporary:
        trial = Path(temporary) / "bundle"
        export_bundle(trial, network, parts)
        sampling = replace(recipe.sampling, requests_max=recipe.test_requests_max)
        measured = evaluate(
            {"this": read_bundle(trial)}, log, OpenVinoEngine, sampling, recipe.training.seed, recipe.split
        )
    with report.step("export"):
        lineage = parts.lineage.model_copy(update={"metrics": measured.flat("this")})
        export_bundle(folder, network, replace(parts, lineage=lineage))
    return read_bundle(folder)


def _learn(
    log: ActionLog, embeddings: PinEmbeddings, recipe: Recipe, report: Reporter
) -> tuple[RankerNetwork, list[Calibration]]:
    """Train a network, and calibrate its heads on the validation part."""
    heads = log.heads
    draft = draft_manifest(recipe.name, space_of(recipe.dataset), log.schema, heads, sequence=recipe.sequence)

    def examples_of(part: Part, sampling: Sampling) -> Examples:
        with report.step(f"{part} examples") as progress:
            builder = ExampleBuilder(log, embeddings, draft, recipe.split, sampling, recipe.training.seed)
            return builder.build(part, progress)

    examples = examples_of("train", recipe.sampling)
    validation = examples_of("validation", replace(recipe.sampling, requests_max=recipe.validation_requests_max))
    report.note(f"{examples.batch.requests:,} requests with {examples.batch.rows:,} rows to learn from")
    sizes = NetworkConfig(
        heads=len(heads),
        actions=len(log.schema.actions),
        surfaces=len(SURFACES),
        scalars=len(scalar_names(log.schema)),
        sequence=recipe.sequence,
    )
    with report.step("training") as progress:
        network, _ = train(
            sizes, heads, examples, validation, recipe.training, progress, lambda e: report.note(_epoch_line(e))
        )
    logits = predict(network, validation, recipe.training.requests_per_batch)
    return network, [fit_calibration(logits[:, i], validation.labels[:, i]) for i in range(len(heads))]


def _bundle_parts(
    dataset: AtomicDataset,
    log: ActionLog,
    embeddings: PinEmbeddings,
    calibrations: Sequence[Calibration],
    recipe: Recipe,
) -> BundleParts:
    """Gather what stands in the bundle beside the network; its metrics are not known yet."""
    seed = recipe.training.seed
    draft = draft_manifest(recipe.name, space_of(recipe.dataset), log.schema, log.heads, sequence=recipe.sequence)
    return BundleParts(
        name=recipe.name,
        version=recipe.version,
        dataset=recipe.dataset,
        schema=log.schema,
        heads=log.heads,
        calibrations=calibrations,
        lineage=Lineage(
            data=dataset.name,
            data_sha256=dataset.sha256,
            command=recipe.command,
            code=_code_version(),
            seed=seed,
            parent=recipe.parent,
        ),
        utility_toml=recipe.utility_toml,
        embeddings=embeddings,
        golden=golden_inputs(draft, embeddings, seed),
    )


def _code_version() -> str:
    try:
        return f"pinrank {version('pinrank')}"
    except PackageNotFoundError:
        return "pinrank, not installed"


def _epoch_line(epoch: Epoch) -> str:
    return f"epoch {epoch.number}: loss {epoch.train_loss:.4f}, on validation {epoch.validation_loss:.4f}"
