"""Scores the requests of the test period with bundles as the server does: engine, calibration, then utility.

All bundles score the same candidates of the same requests. Bundles that read the same groups and embeddings share their
tensors, because building tensors takes longer than scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.engine import EngineFactory, FeatureBatch
from model_store.bundle.files import EMBEDDINGS, USERS, UTILITY, Bundle, BundleError
from model_store.bundle.manifest import Head, Manifest
from model_store.model.loaded import LoadedModel, load_model
from model_store.model.utility import UtilityError, UtilityTable, load_utility
from ranker.baselines.score import BaselinePlan, score_baselines
from ranker.baselines.scores import TreeTraining
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinVectors, embeddings_of
from ranker.data.features import PIN_GROUP
from ranker.data.inputs import full_manifest
from ranker.data.requests import Part, Split
from ranker.data.shown import Shown
from ranker.data.users.rows import UserEncoder
from ranker.errors import DatasetError
from ranker.training.examples import ExampleBuilder, Examples, Sampling, utilities_of
from ranker.training.shown_examples import ShownExampleBuilder, example_builder

ScoringProgress = Callable[[str, int, int], None]

#: Bounds the memory of an engine, whatever the size of the test.
_REQUESTS_PER_RUN = 4


@dataclass(frozen=True, slots=True)
class BundleScores:
    """The scores of the N test rows by one bundle, or by a baseline.

    Attributes:
        heads: heads that have scores.
        probabilities: float32[N, H], calibrated, in the order of `heads`; scores without a scale for most baselines.
        utilities: float32[N], the final order: from the bundle's own utility table; None if it cannot be evaluated.
        utility_missing: why the utility cannot be evaluated.
        table: the utility table; None if it cannot be evaluated.
    """

    heads: tuple[str, ...]
    probabilities: np.ndarray
    utilities: np.ndarray | None
    utility_missing: str | None
    table: UtilityTable | None = None


@dataclass(frozen=True, slots=True)
class ScoredTest:
    """The requests of the test, and the scores of every bundle.

    Attributes:
        heads: the heads of all bundles together.
        labels: float32[N, H], in the order of `heads`.
        popularity: float32[N, H], how often the pin had received the action before.
        row_splits: int32[R + 1].
        users: int64[R].
        activity: int64[R].
        by_bundle: in the requested order.
        baselines: scores of the baselines other than popularity; empty if none were asked for.
        baselines_missing: why a baseline has no scores.
        trees: what LightGBM learned from; None if it was not asked for or is not installed.
        positions: int64[N], where a logged answer showed the pin; empty for requests that were made up.
        propensities: float64[N], the logged probability of the pin at its position; empty for made-up requests.
        surfaces: uint8[R], positions in `SURFACES`.
        attributes: [N] by name of the pin's field, what the bundles' utility tables read.
    """

    heads: tuple[str, ...]
    labels: np.ndarray
    popularity: np.ndarray
    row_splits: np.ndarray
    users: np.ndarray
    activity: np.ndarray
    by_bundle: Mapping[str, BundleScores]
    baselines: Mapping[str, BundleScores] = field(default_factory=dict)
    baselines_missing: Mapping[str, str] = field(default_factory=dict)
    trees: TreeTraining | None = None
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    propensities: np.ndarray = field(default_factory=lambda: np.empty(0, np.float64))
    surfaces: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)


def score_test(
    bundles: Mapping[str, Bundle],
    log: ActionLog,
    factory: EngineFactory,
    sampling: Sampling,
    seed: int,
    split: Split,
    progress: ScoringProgress = lambda _what, _done, _total: None,
    shown: Shown | None = None,
    baselines: BaselinePlan | None = None,
    vectors: Sequence[PinVectors] = (),
    encoders: Sequence[UserEncoder] = (),
) -> ScoredTest:
    """Build the test's requests and score them with each bundle.

    Args:
        bundles: one or more bundles by display name.
        log: the history that contains the test period.
        factory: creates the scoring engine.
        sampling: sampling of candidates.
        seed: seed of the sampled candidates.
        split: determines the test period.
        progress: receives the current task, the number of finished units and their total.
        shown: answered requests, whose newest are the test instead of requests made up of the log.
        baselines: how to fit the baselines, which read the vectors of the first family of bundles; None leaves them
            out.
        vectors: of pins, for the bundles that read their space, instead of those that a bundle carries.
        encoders: the networks of users that bundles carry.

    Raises:
        BundleError: a bundle cannot be loaded, carries no embeddings, or does not fit the data.

    Cost: memory for the tensors of one family of bundles at a time: for R requests of C candidates with a sequence of L
    actions in D dimensions about 4 * R * (L + C) * D bytes.
    """
    heads = {head.name: head for bundle in bundles.values() for head in bundle.manifest.heads}
    tables = {name: _utility_of(bundle) for name, bundle in bundles.items()}
    scored: dict[str, BundleScores] = {}
    first: Examples | None = None
    held_against = _Baselines({}, {})
    kept: dict[str, np.ndarray] = {}
    for family in families(bundles):
        readable = [table for name in family if isinstance(table := tables[name], UtilityTable)]
        attributes = sorted({attribute.field for table in readable for attribute in table.attributes})
        full = first is None and baselines is not None
        source = _Source(bundles[family[0]], tuple(heads.values()), log, shown, split, full, vectors, encoders)
        examples = source.build("test", sampling, seed, progress, attributes)
        if first is None:
            first = examples
            if baselines is not None:
                held_against = _scored_baselines(examples, source, tables[family[0]], baselines, progress)
        elif not _same_candidates(first, examples):
            raise BundleError(
                f"{family[0]} has other candidates than the bundles before it, so they cannot be compared; evaluate it "
                "separately"
            )
        kept |= examples.attributes
        for name in family:
            probabilities = probabilities_of(name, bundles[name], factory, examples, progress)
            table = tables[name]
            own = tuple(head.name for head in bundles[name].manifest.heads)
            if isinstance(table, UtilityTable):
                utilities = utilities_of(table, examples, probabilities)
                scored[name] = BundleScores(own, probabilities, utilities, None, table)
            else:
                scored[name] = BundleScores(own, probabilities, None, table)
    if first is None:
        raise BundleError("there is no bundle to evaluate")
    return ScoredTest(
        tuple(heads),
        first.labels,
        first.popularity,
        first.batch.row_splits,
        first.users,
        first.activity,
        {name: scored[name] for name in bundles},
        held_against.scores,
        held_against.missing,
        held_against.trees,
        first.positions,
        first.propensities,
        first.surfaces,
        kept,
    )


def families(bundles: Mapping[str, Bundle]) -> list[list[str]]:
    """Group bundles that can share tensors; the first of a family reads everything that the others read."""
    found: list[list[str]] = []
    for name in sorted(bundles, key=lambda name: -len(bundles[name].manifest.inputs)):
        for family in found:
            if _reads_all_of(bundles[family[0]], bundles[name]):
                family.append(name)
                break
        else:
            found.append([name])
    return found


def _reads_all_of(one: Bundle, other: Bundle) -> bool:
    ours, theirs = one.manifest, other.manifest
    return (
        ours.groups == theirs.groups
        and ours.surfaces == theirs.surfaces
        and set(theirs.inputs) <= set(ours.inputs)
        and (theirs.sequence is None or _sequence(one) == _sequence(other))
        and all(one.files.get(name) == other.files.get(name) for name in (EMBEDDINGS, USERS))
    )


def _sequence(bundle: Bundle) -> tuple[object, int]:
    return bundle.manifest.sequence, bundle.manifest.sequence_length


def _utility_of(bundle: Bundle) -> UtilityTable | str:
    """Compile the utility table of a bundle, or return why it cannot be evaluated here."""
    try:
        table = load_utility(bundle.files[UTILITY], bundle.manifest)
    except UtilityError as error:
        return str(error)
    foreign = [attribute for attribute in table.attributes if attribute.group != PIN_GROUP]
    if foreign:
        return f"it reads {foreign[0].name} of group {foreign[0].group!r}, which does not derive from interactions"
    return table


def build_test(
    bundle: Bundle,
    heads: tuple[Head, ...],
    attributes: Sequence[str],
    log: ActionLog,
    shown: Shown | None,
    sampling: Sampling,
    seed: int,
    split: Split,
    progress: ScoringProgress,
    encoders: Sequence[UserEncoder] = (),
) -> Examples:
    """Build the requests of the test period, with labels for `heads` and these pin attributes. Raises BundleError."""
    source = _Source(bundle, heads, log, shown, split, encoders=encoders)
    return source.build("test", sampling, seed, progress, attributes)


@dataclass(frozen=True, slots=True)
class _Source:
    """Builds the examples of one bundle.

    Attributes:
        bundle: its groups, inputs and vectors.
        heads: the labels to keep: those of all bundles, so that all are measured on all heads.
        log: the history.
        shown: answered requests, or None.
        split: the boundaries of the parts.
        full: whether to add the inputs that the bundle does not read.
        vectors: of the space of one or the other bundle, instead of its own.
        encoders: networks of users.
    """

    bundle: Bundle
    heads: tuple[Head, ...]
    log: ActionLog
    shown: Shown | None
    split: Split
    full: bool = False
    vectors: Sequence[PinVectors] = ()
    encoders: Sequence[UserEncoder] = ()

    def build(
        self, part: Part, sampling: Sampling, seed: int, progress: ScoringProgress, attributes: Sequence[str] = ()
    ) -> Examples:
        """Build the examples of a part. Raises BundleError."""
        what = "requests" if part == "test" else f"{part} requests"
        try:
            return self._builder(sampling, seed).build(
                part, lambda done, total: progress(what, done, total), attributes
            )
        except (KeyError, ValueError, DatasetError) as error:
            raise BundleError(
                f"{self.bundle.manifest.ref}: cannot build its features from this data: {error}"
            ) from error

    def available(self, part: Part) -> int:
        """Return about how many requests a part has."""
        return self._builder(Sampling(), 0).available(part)

    def manifest(self) -> Manifest:
        """Return the manifest that the examples follow."""
        labelled = self.bundle.manifest.model_copy(update={"heads": self.heads})
        return full_manifest(labelled, self.log.schema) if self.full else labelled

    def _builder(self, sampling: Sampling, seed: int) -> ExampleBuilder | ShownExampleBuilder:
        own = embeddings_of(self.bundle)
        vectors = next((given for given in self.vectors if given.space == own.space), own)
        # Spaces are known by what networks were trained on, and other machines train other weights on the same.
        encoders = [encoder for encoder in self.encoders if encoder.content == self.bundle.files.get(USERS)]
        return example_builder(self.log, self.shown, vectors, self.manifest(), self.split, sampling, seed, encoders)


@dataclass(frozen=True, slots=True)
class _BaselineSource:
    """Builds the rows that baselines learn from as those of the test were built."""

    source: _Source
    seed: int
    progress: ScoringProgress

    def examples(self, part: Part, sampling: Sampling) -> Examples:
        return self.source.build(part, sampling, self.seed, self.progress)

    def available(self, part: Part) -> int:
        return self.source.available(part)


@dataclass(frozen=True, slots=True)
class _Baselines:
    scores: Mapping[str, BundleScores]
    missing: Mapping[str, str]
    trees: TreeTraining | None = None


def _scored_baselines(
    examples: Examples, source: _Source, table: UtilityTable | str, plan: BaselinePlan, progress: ScoringProgress
) -> _Baselines:
    """Score the rows with every baseline; probabilities of all heads give the final order of the bundle's utility."""
    manifest = source.manifest()
    assert manifest.sequence is not None  # noqa: S101 - a full manifest has one
    heads = tuple(head.name for head in source.heads)
    found = score_baselines(
        examples,
        _BaselineSource(source, plan.seed, progress),
        heads,
        manifest.sequence.actions,
        source.log,
        plan,
        progress,
    )
    own = [head.name for head in source.bundle.manifest.heads]
    scores = {}
    for name, baseline in found.scores.items():
        order = baseline.order
        if baseline.probabilities and isinstance(table, UtilityTable) and set(own) <= set(baseline.heads):
            columns = [baseline.heads.index(head) for head in own]
            order = utilities_of(table, examples, baseline.by_head[:, columns])
        scores[name] = BundleScores(baseline.heads, baseline.by_head, order, None)
    return _Baselines(scores, found.missing, found.trees)


def _same_candidates(one: Examples, other: Examples) -> bool:
    return all(
        np.array_equal(ours, theirs)
        for ours, theirs in (
            (one.batch.row_splits, other.batch.row_splits),
            (one.users, other.users),
            (one.surfaces, other.surfaces),
            (one.labels, other.labels),
            (one.popularity, other.popularity),
        )
    )


def probabilities_of(
    name: str, bundle: Bundle, factory: EngineFactory, examples: Examples, progress: ScoringProgress
) -> np.ndarray:
    """Return float32[N, H] calibrated probabilities."""
    model = load_model(bundle, factory, streams=1, warm=False)  # no request waits for a run
    try:
        total = examples.batch.requests
        parts = []
        for start in range(0, total, _REQUESTS_PER_RUN):
            stop = min(start + _REQUESTS_PER_RUN, total)
            batch = _read_by(model, examples.take(np.arange(start, stop)).batch)
            parts.append(model.probabilities(model.engine.run(batch)))
            progress(name, stop, total)
        return np.concatenate(parts)
    finally:
        model.engine.close()


def _read_by(model: LoadedModel, batch: FeatureBatch) -> FeatureBatch:
    """Drop the tensors that only other bundles of the family read."""
    names = {spec.name for spec in model.manifest.specs}
    return FeatureBatch(
        {name: tensor for name, tensor in batch.request.items() if name in names},
        {name: tensor for name, tensor in batch.candidate.items() if name in names},
        batch.row_splits,
    )
