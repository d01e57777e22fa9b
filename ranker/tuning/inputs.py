"""Requests to tune on: logged answers, or the test part of a dataset scored by the bundle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from impressions.dataset import JoinError, read_manifest, read_slates
from impressions.slates import Slates
from kernels.engine import EngineFactory
from model_store.bundle.files import NETWORK, UTILITY, Bundle
from model_store.model.discount import discounts
from model_store.model.utility import UtilityError, UtilityTable, load_utility
from model_store.registry.store import ModelStore
from ranker.data.actions import ActionLog
from ranker.data.features import PIN_GROUP, SURFACES
from ranker.data.requests import Split, part_slices
from ranker.data.users.rows import UserEncoder
from ranker.errors import DatasetError, SettingError
from ranker.evaluation.scoring import build_test, probabilities_of
from ranker.training.examples import Sampling
from ranker.tuning.orders import ScoredRequests

#: So many users with whole answers are enough to tune on these alone. A mean over 100 users has a standard error of 10%
#: of the spread between users; `explore evaluate` asks for as many.
WHOLE_USERS_MIN = 100


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """Logged answers, by whether they hold all candidates of their requests.

    The values of other weights are only known for whole answers: in a cut one, other weights might show the candidates
    that it left out, and tuning can only reorder those that it holds.

    Attributes:
        whole: number of whole answers.
        whole_users: of how many users.
        whole_candidates: candidates per request, on average; 0 without such answers.
        cut: number of the others.
        cut_candidates: candidates per request of the others, on average; 0 without such answers.
    """

    whole: int
    whole_users: int
    whole_candidates: float
    cut: int
    cut_candidates: float

    @property
    def whole_only(self) -> bool:
        """Whether cut answers are left out, because the whole ones are of enough users."""
        return self.whole_users >= WHOLE_USERS_MIN


@dataclass(frozen=True, slots=True)
class TuningData:
    """R requests of one surface with N candidates, as the network scored them.

    Attributes:
        name: name of the data.
        surface: the surface.
        since_ms: time of the first request, Unix time in milliseconds.
        until_ms: the time before which all requests were made.
        users: int64[R] or uint64[R].
        row_splits: int64[R + 1].
        probabilities: float32[N, H], calibrated, in the order of the bundle's heads.
        attributes: float64[N] by name, such as "pin.creator_tail".
        labels: float32[N, H], 1 where the candidate received the head's action.
        examined: float64[N], the probability that the user looked at the candidate, up to a factor.
        answers: what the logged answers hold; None for requests that were not logged, which have all candidates.
    """

    name: str
    surface: str
    since_ms: int
    until_ms: int
    users: np.ndarray
    row_splits: np.ndarray
    probabilities: np.ndarray
    attributes: Mapping[str, np.ndarray]
    labels: np.ndarray
    examined: np.ndarray
    answers: AnswerCounts | None = None

    def scored(self, table: UtilityTable, top_k: int = 0) -> ScoredRequests:
        """Evaluate the parties' expressions of a table over the probabilities."""
        parties = table.surfaces[self.surface].parties
        return ScoredRequests(parties, self.users, self.row_splits, self._utilities(table, self.probabilities), top_k)

    def rewards(self, table: UtilityTable) -> np.ndarray:
        """Return float64[N, P]: the same expressions over what happened, 0 or 1, instead of probabilities.

        What actions add is divided by the probability that the user looked, so that an action further down counts as
        it would at the top: a position-based model (T. Joachims, A. Swaminathan and T. Schnabel, WSDM 2017).
        """
        without = self._utilities(table, np.zeros_like(self.labels))
        added = self._utilities(table, self.labels) - without
        rewards: np.ndarray = without + added / self.examined[:, None]
        return rewards

    def _utilities(self, table: UtilityTable, values: np.ndarray) -> np.ndarray:
        columns = {attribute: self.attributes[attribute.name] for attribute in table.attributes}
        return table.party_utilities_of_rows(self.surface, values, columns)


def utility_of(bundle: Bundle, surface: str, content: bytes | None = None) -> UtilityTable:
    """Compile a bundle's utility table, or another content for it.

    Raises:
        SettingError: the table is invalid, or does not have the surface.
    """
    try:
        table = load_utility(bundle.files[UTILITY] if content is None else content, bundle.manifest)
    except UtilityError as error:
        raise SettingError(f"{bundle.manifest.ref}: {error}") from error
    if surface not in table.surfaces:
        known = ", ".join(sorted(table.surfaces))
        raise SettingError(f"{bundle.manifest.ref} does not rank the surface {surface!r}; it ranks {known}")
    return table


def versions_of_network(store: ModelStore, bundle: Bundle) -> list[str]:
    """Return "name@version" of all versions with the same probabilities: their answers can be tuned on together."""
    manifest = bundle.manifest
    same = []
    for version in sorted(store.state(manifest.name).versions):
        other = store.manifest(manifest.name, version)
        if other.files[NETWORK] == manifest.files[NETWORK] and other.heads == manifest.heads:
            same.append(other.ref)
    return same


def logged_requests(folder: Path, bundle: Bundle, surface: str, models: Collection[str]) -> TuningData:
    """Read the answers of a joined dataset that these versions gave on a surface.

    Answers that leave out candidates of their requests stay away if the others are of enough users (`AnswerCounts`).

    Raises:
        DatasetError: the folder is not a joined dataset; it has no such answer; or it lacks an attribute that the
            bundle's utility table reads.
    """
    table = utility_of(bundle, surface)
    try:
        slates = read_slates(folder, surface)
        digest = read_manifest(folder).inputs_sha256
    except JoinError as error:
        raise DatasetError(str(error)) from error
    chosen = [one for one in slates if one.model in models and one.requests]
    if not chosen:
        known = ", ".join(sorted({one.model for one in slates})) or "none"
        raise DatasetError(
            f"{folder} has no answer of {' or '.join(models)} on {surface}; it has answers of: {known}. Tune a version "
            "of the network that answered, or join a newer part of the log"
        )
    heads = [head.name for head in bundle.manifest.heads]
    names = [attribute.name for attribute in table.attributes]
    for one in chosen:
        lacking = [n for n in names if n not in one.attributes] + [h for h in heads if h not in one.heads]
        if lacking:
            raise DatasetError(
                f"the answers of {one.model} in {folder} do not have {', '.join(lacking)}, which {bundle.manifest.ref} "
                "reads; log answers with a utility table that reads it"
            )
    answers = _counted(chosen)
    if answers.whole_only:
        chosen = [one.where(np.diff(one.row_splits) == one.candidates) for one in chosen]
    counts = np.concatenate([np.diff(one.row_splits) for one in chosen])
    row_splits = np.concatenate([[0], np.cumsum(counts)])
    positions = np.concatenate([one.positions for one in chosen])
    # Candidates as the caller sent them: servers leave equal utilities in that order.
    rows = np.lexsort((np.concatenate([one.places for one in chosen]), np.repeat(np.arange(len(counts)), counts)))
    actions = [[one.actions.index(head) for head in heads] for one in chosen]
    times_ms = np.concatenate([one.time_ms for one in chosen])
    return TuningData(
        name=f"{folder.resolve().name} ({digest[:12]})",
        surface=surface,
        since_ms=int(times_ms.min()),
        until_ms=int(times_ms.max()) + 1,
        users=np.concatenate([one.user_ids for one in chosen]),
        row_splits=row_splits,
        probabilities=np.concatenate([s.probabilities[:, [s.heads.index(head) for head in heads]] for s in chosen])[
            rows
        ],
        attributes={
            name: np.concatenate([one.attribute_values[:, one.attributes.index(name)] for one in chosen])[rows]
            for name in names
        },
        labels=np.concatenate([s.labels[:, columns] for s, columns in zip(chosen, actions, strict=True)])[rows].astype(
            np.float32
        ),
        # Nobody can act on a pin that was not looked at, so such a row teaches nothing and has no label.
        examined=discounts(int(positions.max(initial=0)) + 1)[positions][rows],
        answers=answers,
    )


def _counted(slates: Sequence[Slates]) -> AnswerCounts:
    candidates = np.concatenate([one.candidates for one in slates])
    some = candidates > 0  # an answer to no candidates is neither whole nor cut
    candidates = candidates[some]
    whole = np.concatenate([np.diff(one.row_splits) for one in slates])[some] == candidates
    users = np.concatenate([one.user_ids for one in slates])[some]

    def mean(chosen: np.ndarray) -> float:
        return float(candidates[chosen].mean()) if chosen.any() else 0.0

    return AnswerCounts(int(whole.sum()), len(np.unique(users[whole])), mean(whole), int((~whole).sum()), mean(~whole))


def dataset_requests(
    bundle: Bundle,
    surface: str,
    log: ActionLog,
    factory: EngineFactory,
    sampling: Sampling,
    seed: int,
    name: str,
    progress: Callable[[str, int, int], None],
    encoders: Sequence[UserEncoder] = (),
) -> TuningData:
    """Score the requests of a dataset's test part, as `pinrank evaluate` does, and keep those of one surface.

    Raises:
        BundleError: the bundle cannot be loaded, carries no embeddings, or does not fit the data.
        DatasetError: the data has no request of the surface.
    """
    table, split = utility_of(bundle, surface), Split()
    foreign = [attribute for attribute in table.attributes if attribute.group != PIN_GROUP]
    if foreign:
        raise SettingError(
            f"the utility table reads {foreign[0].name} of group {foreign[0].group!r}, which does not derive from "
            "interactions; tune on logged answers (--on)"
        )
    fields = [attribute.field for attribute in table.attributes]
    examples = build_test(bundle, bundle.manifest.heads, fields, log, None, sampling, seed, split, progress, encoders)
    on_surface = np.flatnonzero(examples.surfaces == (SURFACES.index(surface) if surface in SURFACES else -1))
    if not len(on_surface):
        raise DatasetError(f"the test part of {name} has no request on {surface}")
    examples = examples.take(on_surface)
    spans = part_slices(log, split, "test")
    return TuningData(
        name=name,
        surface=surface,
        since_ms=spans[0].start_ms,
        until_ms=spans[-1].stop_ms,
        users=examples.users,
        row_splits=examples.batch.row_splits.astype(np.int64),
        probabilities=probabilities_of(bundle.manifest.ref, bundle, factory, examples, progress),
        attributes={a.name: examples.attributes[a.field].astype(np.float64) for a in table.attributes},
        labels=examples.labels,
        examined=np.ones(len(examples.labels)),
    )
