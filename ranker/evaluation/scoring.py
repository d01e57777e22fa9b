"""The requests of the test period, scored by bundles the way the server scores: engine, calibration, then the utility.

All bundles score the same candidates of the same requests. Tensors are built once for bundles that read the same groups
from the same embeddings: building takes longer than scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.engine import EngineFactory, FeatureBatch
from model_store.bundle.files import EMBEDDINGS, UTILITY, Bundle, BundleError
from model_store.bundle.manifest import Head
from model_store.model.loaded import LoadedModel, load_model
from model_store.model.utility import UtilityError, UtilityTable, load_utility
from ranker.data.actions import ActionLog
from ranker.data.embeddings import embeddings_of
from ranker.data.features import PIN_GROUP, SURFACES
from ranker.data.requests import Split
from ranker.errors import DatasetError
from ranker.training.examples import ExampleBuilder, Examples, Sampling

ScoringProgress = Callable[[str, int, int], None]

#: Bounds what an engine holds at a time, whatever the size of the test.
_REQUESTS_PER_RUN = 4


@dataclass(frozen=True, slots=True)
class BundleScores:
    """What one bundle says about the test's N rows.

    Attributes:
        heads: the bundle's.
        probabilities: float32[N, H], calibrated, in the order of `heads`.
        utilities: float32[N], what the bundle's own utility table makes of them; None where it cannot be evaluated.
        utility_missing: why not.
    """

    heads: tuple[str, ...]
    probabilities: np.ndarray
    utilities: np.ndarray | None
    utility_missing: str | None


@dataclass(frozen=True, slots=True)
class ScoredTest:
    """The test's requests, and every bundle's scores of them.

    Attributes:
        heads: all that any bundle has.
        labels: float32[N, H], in the order of `heads`.
        popularity: float32[N, H], how often the pin had received the action before.
        row_splits: int32[R + 1].
        users: int64[R].
        activity: int64[R].
        by_bundle: in the order asked for.
    """

    heads: tuple[str, ...]
    labels: np.ndarray
    popularity: np.ndarray
    row_splits: np.ndarray
    users: np.ndarray
    activity: np.ndarray
    by_bundle: Mapping[str, BundleScores]


def score_test(
    bundles: Mapping[str, Bundle],
    log: ActionLog,
    factory: EngineFactory,
    sampling: Sampling,
    seed: int,
    split: Split,
    progress: ScoringProgress,
) -> ScoredTest:
    """Build the test's requests and score them with each bundle.

    Args:
        bundles: by the name to show; one or more.
        log: the history that holds the test period.
        factory: the engine to score with.
        sampling: of candidates.
        seed: of the drawn candidates.
        split: where the test period starts.
        progress: told what is being worked on, how much is done and how much there is.

    Raises:
        BundleError: a bundle cannot be loaded, carries no embeddings, or does not fit the data.

    Cost: the tensors of one family of bundles at a time: for R requests of C candidates with a sequence of L actions in
    D dimensions about 4 * R * (L + C) * D bytes.
    """
    heads = {head.name: head for bundle in bundles.values() for head in bundle.manifest.heads}
    utilities = {name: _utility_of(bundle) for name, bundle in bundles.items()}
    scored: dict[str, BundleScores] = {}
    first: Examples | None = None
    for family in families(bundles):
        tables = [table for name in family if isinstance(table := utilities[name], UtilityTable)]
        attributes = sorted({attribute.field for table in tables for attribute in table.attributes})
        examples = _build(bundles[family[0]], tuple(heads.values()), attributes, log, sampling, seed, split, progress)
        if first is None:
            first = examples
        elif not _same_candidates(first, examples):
            raise BundleError(
                f"{family[0]} was given other candidates than the bundles before it, so they cannot be compared; "
                f"evaluate it alone"
            )
        for name in family:
            probabilities = _probabilities(name, bundles[name], factory, examples, progress)
            table = utilities[name]
            own = tuple(head.name for head in bundles[name].manifest.heads)
            if isinstance(table, UtilityTable):
                scored[name] = BundleScores(own, probabilities, utilities_of(table, examples, probabilities), None)
            else:
                scored[name] = BundleScores(own, probabilities, None, table)
    if first is None:
        raise BundleError("no bundle to evaluate")
    return ScoredTest(
        tuple(heads),
        first.labels,
        first.popularity,
        first.batch.row_splits,
        first.users,
        first.activity,
        {name: scored[name] for name in bundles},
    )


def families(bundles: Mapping[str, Bundle]) -> list[list[str]]:
    """Group bundles that can score the same tensors; the first of a family reads all that the others read."""
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
        and one.files.get(EMBEDDINGS) == other.files.get(EMBEDDINGS)
    )


def _sequence(bundle: Bundle) -> tuple[object, int]:
    return bundle.manifest.sequence, bundle.manifest.sequence_length


def _utility_of(bundle: Bundle) -> UtilityTable | str:
    """Compile a bundle's utility table, or say why it cannot be evaluated here."""
    try:
        table = load_utility(bundle.files[UTILITY], bundle.manifest)
    except UtilityError as error:
        return str(error)
    foreign = [attribute for attribute in table.attributes if attribute.group != PIN_GROUP]
    if foreign:
        return f"it reads {foreign[0].name} of group {foreign[0].group!r}, which is not made from interactions"
    return table


def _build(
    bundle: Bundle,
    heads: tuple[Head, ...],
    attributes: Sequence[str],
    log: ActionLog,
    sampling: Sampling,
    seed: int,
    split: Split,
    progress: ScoringProgress,
) -> Examples:
    manifest = bundle.manifest
    embeddings = embeddings_of(bundle)
    try:
        # Heads only say which labels to keep: those of all bundles, so that everyone is measured on all of them.
        builder = ExampleBuilder(log, embeddings, manifest.model_copy(update={"heads": heads}), split, sampling, seed)
        return builder.build("test", lambda done, total: progress("requests", done, total), attributes)
    except (KeyError, ValueError, DatasetError) as error:
        raise BundleError(f"{manifest.ref}: cannot build its features from this data: {error}") from error


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


def _probabilities(
    name: str, bundle: Bundle, factory: EngineFactory, examples: Examples, progress: ScoringProgress
) -> np.ndarray:
    """Return float32[N, H] calibrated probabilities."""
    model = load_model(bundle, factory, streams=1, warm=False)  # nobody waits for a run, or asks what it costs
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
    """Leave out the tensors that only others of the family read."""
    names = {spec.name for spec in model.manifest.specs}
    return FeatureBatch(
        {name: tensor for name, tensor in batch.request.items() if name in names},
        {name: tensor for name, tensor in batch.candidate.items() if name in names},
        batch.row_splits,
    )


def utilities_of(table: UtilityTable, examples: Examples, probabilities: np.ndarray) -> np.ndarray:
    """Return float32[N], as the server computes them, surface by surface."""
    result = np.empty(len(probabilities), np.float32)
    surface_of_row = np.repeat(examples.surfaces, np.diff(examples.batch.row_splits))
    for position in np.unique(surface_of_row):
        rows, surface = np.flatnonzero(surface_of_row == position), SURFACES[position]
        attributes = {a: examples.attributes[a.field][rows] for a in table.attributes}
        parties = table.party_utilities_of_rows(surface, probabilities[rows], attributes)
        result[rows] = table.combine(surface, parties)
    return result
