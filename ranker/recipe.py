"""The whole pipeline from a dataset to a bundle: embeddings, examples, training, calibration, export."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from kernels.cpu.openvino_engine import OpenVinoEngine
from model_store.bundle.files import Bundle, read_bundle, write_bundle
from model_store.bundle.manifest import Calibration, Lineage, Manifest
from model_store.bundle.statistics import make_statistics
from model_store.model.loaded import calibrate
from ranker.baselines.score import BaselinePlan, training_rows
from ranker.counterfactual.gate import GateAnswers, rate_breaches
from ranker.data.atomic.recbole import AtomicDataset
from ranker.data.embeddings import PinEmbeddings
from ranker.data.requests import Part
from ranker.data.shown import Impressions
from ranker.data.users.rows import UserEncoder
from ranker.embedding.vector_file import GivenVectors
from ranker.errors import GateError
from ranker.evaluation.evaluate import evaluate
from ranker.evaluation.gates import Gates, check_rate_gates, losses, miscalibrated, refusal, shortfalls
from ranker.evaluation.scoring import score_test
from ranker.export.bundle import BundleParts, export_bundle
from ranker.export.golden import golden_inputs
from ranker.export.manifest import in_space
from ranker.network.calibration import fit_calibration
from ranker.network.model import RankerNetwork
from ranker.progress import Reporter, StepProgress
from ranker.recipe_settings import Recipe, Target
from ranker.recipe_source import Given, Source
from ranker.training.examples import Examples, Sampling, newest_and_held
from ranker.training.fit import learn_newest, predict, train
from ranker.training.parent import Parent
from ranker.training.progress import Continued, Epoch, Step
from ranker.training.settings import Execution
from ranker.training.shown_examples import example_builder
from ranker.training.time_window import hidden_share

#: If training hides more than this share, the network rarely sees sequences like those it will serve.
_HIDDEN_SHARE_FAIR = 0.5


def make_bundle(
    folder: Path,
    dataset: AtomicDataset,
    recipe: Recipe,
    reporter: Reporter,
    execution: Execution | None = None,
    parent: Parent | None = None,
    gates: Gates | None = None,
    impressions: Impressions | None = None,
    *,
    baseline_requests_max: int = 0,
    published: Sequence[Manifest] = (),
    vectors: GivenVectors | None = None,
    users: UserEncoder | None = None,
) -> Bundle:
    """Train on a dataset and write the bundle into a folder that does not exist yet.

    Args:
        folder: destination of the bundle.
        dataset: the data to learn from.
        recipe: the settings of the model.
        reporter: receives the progress.
        execution: how to train. With several ranks, all ranks but the first call `assist`.
        parent: the version to continue from: on newer events, with the same network sizes and embedding space.
        gates: limits that the new model must meet against the parent on the newest requests.
        impressions: answered requests to learn from and to measure on, instead of requests made up of interactions. The
            parent's successor reads the stored rows that their log keeps.
        baseline_requests_max: approximate maximum number of the training requests that baselines learn from; the model
            is compared with them, and the lineage holds their HIT@3, and where the model is not at least as good. 0
            compares with none.
        published: manifests of versions whose features may be in the same store. Groups of the same description keep
            their version; others get a free one.
        vectors: of the pins, instead of the SVD; of the parent's embedding space, if there is a parent.
        users: makes a vector of each user for the network to read; None for the parent's, if it has one.

    Raises:
        GateError: the new model fails a gate; no bundle is written.
        DatasetError: the data is not enough to learn from, or `vectors` or `users` are made of events that the model is
            trained or measured on.
        PropensityError: no logged answer can tell what the gates ask; raised before any work.
        SettingError: a head weight, a gate, the variant or the utility table names something unknown; raised before any
            work.
        CheckpointError: the checkpoint is damaged, or belongs to another run.
        DivergedError: the loss is no longer finite.
        ParityError: an engine does not compute the same as the trained network.
    """
    source, given = Source.of(dataset, parent, impressions), Given.of(parent, vectors, users)
    for note in source.notes():
        reporter.note(note)
    log = source.log
    recipe = source.new_to(recipe, parent)
    target = given.target(recipe, source)
    if gates:
        check_rate_gates(gates.rates, source.heads, target.parties)
    answers = GateAnswers.of(source.shown, recipe.split) if parent and gates and gates.rates else None
    embeddings = given.embeddings(source, recipe, reporter)
    others = [*published, parent.bundle.manifest] if parent else published
    target = replace(target, draft=in_space(target.draft, embeddings.space, others))
    work = execution or Execution()
    network, validation = _learn(source, given, embeddings, recipe, target, reporter, work)
    logits = predict(network, validation)
    calibrations = [fit_calibration(logits[:, i], validation.labels[:, i]) for i in range(len(source.heads))]
    parts = _bundle_parts(dataset, source, embeddings, calibrations, recipe, target.draft, validation, logits, given)
    # The manifest holds metrics that are measured on the bundle itself, so a first bundle is written to measure them.
    with tempfile.TemporaryDirectory() as temporary:
        unmeasured = Path(temporary) / "bundle"
        with reporter.step("export"):
            export_bundle(unmeasured, network, parts)
        made = read_bundle(unmeasured)
    plan = BaselinePlan(
        recipe.sampling,
        baseline_requests_max,
        newest_requests_max=recipe.newest_requests_max,
        seed=recipe.training.seed,
        threads=work.threads,
    )
    vectors_given = [vectors] if vectors else []
    with reporter.step("test") as progress:
        sampling = replace(recipe.sampling, requests_max=recipe.test_requests_max)
        bundles = {"parent": parent.bundle, "this": made} if parent else {"this": made}
        measured = evaluate(
            bundles,
            log,
            OpenVinoEngine,
            sampling,
            recipe.training.seed,
            recipe.split,
            progress=lambda what, done, total: progress(done, total, what),
            shown=source.shown,
            against=plan if baseline_requests_max else None,
            vectors=vectors_given,
            encoders=given.encoders,
        )
    lost = losses(measured, "this", "parent", gates) if parent and gates else []
    if gates and answers:
        with reporter.step("counterfactual gates"):
            test = score_test(
                bundles,
                log,
                OpenVinoEngine,
                sampling,
                recipe.training.seed,
                recipe.split,
                shown=answers.shown,
                vectors=vectors_given,
                encoders=given.encoders,
            )
            reporter.note(answers.described(len(test.users)))
            lost += rate_breaches(test, "this", "parent", gates.rates)
    if parent and gates:
        wrong = miscalibrated(measured, "this", gates)
        if reason := refusal(parent.bundle.manifest.ref, lost, wrong):
            raise GateError(reason)
    for name, reason in measured.baselines_missing.items():
        reporter.note(f"the model was not compared with {name}: {reason}")
    if measured.trees is not None:
        reporter.note(str(measured.trees))
    lineage = parts.lineage.model_copy(
        update={"metrics": measured.flat("this"), "shortfalls": tuple(shortfalls(measured, "this"))}
    )
    fields = replace(parts, lineage=lineage).manifest_fields(network.config)
    write_bundle(folder, fields, made.files)
    return read_bundle(folder)


def assist(
    dataset: AtomicDataset,
    recipe: Recipe,
    reporter: Reporter,
    execution: Execution,
    parent: Parent | None = None,
    impressions: Impressions | None = None,
    vectors: GivenVectors | None = None,
    users: UserEncoder | None = None,
) -> None:
    """Run `make_bundle` on a rank other than 0: learn from a share of every minibatch and leave the rest to rank 0.

    Every rank builds all examples itself. This takes no longer than building them once, and needs no transport.
    """
    source, given = Source.of(dataset, parent, impressions), Given.of(parent, vectors, users)
    recipe = source.new_to(recipe, parent)
    target = given.target(recipe, source)
    _learn(source, given, given.embeddings(source, recipe, reporter), recipe, target, reporter, execution)


def _learn(
    source: Source,
    given: Given,
    embeddings: PinEmbeddings,
    recipe: Recipe,
    target: Target,
    reporter: Reporter,
    execution: Execution,
) -> tuple[RankerNetwork, Examples]:
    """Train a network; return it with validation examples that it has not learned from."""
    vectors = given.pins or embeddings

    def examples_of(part: Part, sampling: Sampling, attributes: Sequence[str] = ()) -> Examples:
        with reporter.step(f"{part} examples") as progress:
            builder = example_builder(
                *(source.log, source.shown, vectors, target.draft, recipe.split, sampling, recipe.training.seed),
                given.encoders,
            )
            return builder.build(part, progress, attributes)

    examples = examples_of("train", recipe.sampling)
    validation = examples_of(
        "validation",
        replace(recipe.sampling, requests_max=recipe.validation_requests_max),
        [attribute.field for attribute in target.utility.attributes],
    )
    reporter.note(f"training on {examples.batch.requests:,} requests with {examples.batch.rows:,} rows")
    hidden = hidden_share(examples.ages_s, recipe.training.time_window_h_max, recipe.training.time_window_share)
    if hidden > _HIDDEN_SHARE_FAIR:
        reporter.note(
            f"the time window hides {hidden:.0%} of all actions in training, because the users of this data act in "
            "short bursts; lower --time-window-h or --time-window-share to learn from more of them"
        )
    with reporter.step("training") as progress:
        shown = replace(
            execution, watchers=(_TrainingProgress(progress, reporter, recipe.training.epochs), *execution.watchers)
        )
        parameters = given.parent.parameters if given.parent else None
        network, epochs = train(
            target.sizes, source.heads, examples, validation, recipe.training, shown, parameters, target.utility
        )
    if not recipe.newest_requests_max:
        return network, validation
    newest, held = newest_and_held(validation)
    steps = len(epochs) * math.ceil(examples.batch.requests / recipe.training.requests_per_batch)
    with reporter.step("newest requests") as progress:
        reporter.note(
            f"continuing on {newest.batch.requests:,} newer requests, and calibrating on {held.batch.requests:,} others"
        )
        own = _TrainingProgress(progress, reporter, recipe.training.newest_epochs)
        others = (Continued(watcher, steps, len(epochs)) for watcher in execution.watchers)
        shown = replace(execution, watchers=(own, *others), checkpoints=None)
        return learn_newest(network, source.heads, newest, held, recipe.training, shown, target.utility), held


class _TrainingProgress:
    """Reports the progress of a training as console lines and a progress bar."""

    def __init__(self, progress: StepProgress, reporter: Reporter, epochs: int) -> None:
        self._progress, self._reporter, self._epochs = progress, reporter, epochs

    def step(self, step: Step) -> None:
        detail = f"epoch {step.epoch}/{self._epochs}, loss {step.loss:.4f}, {step.rows_per_s:,.0f} rows/s"
        self._progress(step.done, step.total, detail)

    def epoch(self, epoch: Epoch) -> None:
        by_head = ", ".join(f"{head} {loss:.4f}" for head, loss in epoch.validation_losses.items())
        losses = f"training loss {epoch.train_loss:.4f}, validation loss {epoch.validation_loss:.4f} ({by_head})"
        order = "" if epoch.utility_order is None else f", utility's order {epoch.utility_order:.4f} of 1"
        self._reporter.note(f"epoch {epoch.number}: {losses}{order}")


def _bundle_parts(
    dataset: AtomicDataset,
    source: Source,
    embeddings: PinEmbeddings,
    calibrations: Sequence[Calibration],
    recipe: Recipe,
    draft: Manifest,
    validation: Examples,
    logits: np.ndarray,
    given: Given,
) -> BundleParts:
    """Collect the parts of the bundle other than the network; its metrics are not known yet."""
    seed = recipe.training.seed
    calibrated = draft.model_copy(
        update={
            "heads": tuple(
                h.model_copy(update={"calibration": c}) for h, c in zip(draft.heads, calibrations, strict=True)
            )
        }
    )
    # The calibration data resembles the requests that the model will serve most closely.
    statistics = make_statistics(draft, validation.batch, calibrate(calibrated, logits))
    return BundleParts(
        name=recipe.name,
        version=recipe.version,
        groups=draft.groups,
        schema=source.log.schema,
        described=source.log.described,
        heads=source.heads,
        calibrations=calibrations,
        lineage=Lineage(
            data=dataset.name
            if source.shown is None
            else f"{dataset.name}, impressions {source.shown.inputs_sha256[:12]}",
            data_sha256=dataset.sha256,
            command=recipe.command,
            code=_code_version(),
            seed=seed,
            parent=recipe.parent,
            learned_until_ms=source.learned_until_ms(recipe.split),
            training_rows=training_rows(recipe.sampling, recipe.newest_requests_max),
        ),
        utility_toml=recipe.utility_toml,
        explore_toml=recipe.explore_toml,
        embeddings=embeddings,
        golden=golden_inputs(draft, embeddings, seed),
        sequence_length=draft.sequence_length,
        statistics=statistics.model_dump_json(indent=1).encode(),
        users=given.users,
    )


def _code_version() -> str:
    try:
        return f"pinrank {version('pinrank')}"
    except PackageNotFoundError:
        return "pinrank, not installed"
