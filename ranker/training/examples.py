"""Past requests as input tensors and labels, built by the same assembler that the server uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from feature_client.codec import Rows, RowState
from feature_client.features import FetchedFeatures
from feature_client.groups import SequenceGroup
from kernels.engine import FeatureBatch
from model_store.bundle.manifest import Manifest
from model_store.model.assembly import Assembler
from model_store.model.utility import UtilityTable
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinVectors
from ranker.data.features import PIN_GROUP, SURFACES, USER_GROUP, Groups, events_of, pin_rows, user_rows
from ranker.data.folding import folded_in
from ranker.data.requests import Part, Request, Slice, Split, part_slices, slice_requests
from ranker.data.users.rows import UserEncoder, rows_by_group
from ranker.errors import DatasetError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many negatives a request gets besides its logged pins: sampled uniformly from pins the user never acts on.

    "Never" includes the future: the choice of candidates may know it, their features may not. Uniform samples are
    mostly unpopular pins, which helps a popularity baseline rather than hurting it.

    A pin without actions before the slice has no counts yet. Where the catalogue is young, many logged pins are such
    new pins; if sampled pins never were, this would give the answer away. So each sampled pin is new, that is,
    first acted on by others in the same slice, with the probability that an event of the slice is on a new pin.
    """

    #: Negatives per training request.
    negatives: int = 64
    #: Validation and test requests are filled up to this many candidates.
    candidates: int = 100
    #: Approximate maximum number of requests per part, sampled evenly; None takes all.
    requests_max: int | None = None


@dataclass(frozen=True, slots=True)
class Examples:
    """Requests with their outcomes.

    Attributes:
        batch: R requests, N rows.
        labels: float32[N, H], 1 where the candidate received the head's action.
        popularity: float32[N, H], how often the candidate had received it from any user before its slice.
        users: int64[R], positions in `log.user_ids`.
        activity: int64[R], how many events the user had strictly before the request.
        ages_s: float32[R, L], age of each action of the sequence at the request in seconds, newest first; infinite past
            the end.
        surfaces: uint8[R], positions in `ranker.data.features.SURFACES`.
        attributes: [N] by name, candidate fields that `ExampleBuilder.build` was asked to keep.
        pins: int64[N], positions in `log.pin_ids`.
        snapshot_ms: int64[R], start of the request's slice, Unix time in milliseconds; rows are as of this time.
        positions: int64[N], where a logged answer showed the pin, from 0; empty for requests that were made up.
        propensities: float64[N], the logged probability of the pin at its position; empty for requests that were made
            up.

    Networks read the batch only; the other arrays serve training and evaluation.
    """

    batch: FeatureBatch
    labels: np.ndarray
    popularity: np.ndarray
    users: np.ndarray
    activity: np.ndarray
    ages_s: np.ndarray
    surfaces: np.ndarray
    pins: np.ndarray
    snapshot_ms: np.ndarray
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    propensities: np.ndarray = field(default_factory=lambda: np.empty(0, np.float64))

    @staticmethod
    def concat(parts: Sequence[Examples]) -> Examples:
        """Return the requests of all parts, in the order given."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in (
                *("labels", "popularity", "users", "activity", "ages_s", "surfaces"),
                *("pins", "snapshot_ms", "positions", "propensities"),
            )
        }
        attributes = {name: np.concatenate([part.attributes[name] for part in parts]) for name in parts[0].attributes}
        return Examples(FeatureBatch.concat([part.batch for part in parts]), **arrays, attributes=attributes)

    def take(self, requests: np.ndarray) -> Examples:
        """Return the requests at these positions, in the order given."""
        splits = self.batch.row_splits.astype(np.int64)
        counts = (splits[1:] - splits[:-1])[requests]
        stops = np.cumsum(counts)
        rows = np.arange(stops[-1] if len(stops) else 0) + np.repeat(splits[requests] - (stops - counts), counts)
        batch = FeatureBatch(
            {name: tensor[requests] for name, tensor in self.batch.request.items()},
            {name: tensor[rows] for name, tensor in self.batch.candidate.items()},
            np.concatenate([[0], stops]).astype(np.int32),
        )
        return Examples(
            batch,
            self.labels[rows],
            self.popularity[rows],
            self.users[requests],
            self.activity[requests],
            self.ages_s[requests],
            self.surfaces[requests],
            self.pins[rows],
            self.snapshot_ms[requests],
            {name: column[rows] for name, column in self.attributes.items()},
            self.positions[rows] if len(self.positions) else self.positions,
            self.propensities[rows] if len(self.propensities) else self.propensities,
        )


def newest_and_held(validation: Examples) -> tuple[Examples, Examples]:
    """Return every other validation request, to learn from last, and the rest, to calibrate with.

    Both are of the same time: the newest that a network can know.

    Raises:
        DatasetError: there is only one request.
    """
    if validation.batch.requests < 2:
        raise DatasetError(
            "the validation part of the data has only one request, which cannot both teach and calibrate; use more "
            "data, or pass --newest-epochs 0"
        )
    requests = np.arange(validation.batch.requests)
    return validation.take(requests[::2]), validation.take(requests[1::2])


def utilities_of(table: UtilityTable, examples: Examples, probabilities: np.ndarray) -> np.ndarray:
    """Return float32[N], computed as the server does, surface by surface."""
    result = np.empty(len(probabilities), np.float32)
    surface_of_row = np.repeat(examples.surfaces, np.diff(examples.batch.row_splits))
    for position in np.unique(surface_of_row):
        rows, surface = np.flatnonzero(surface_of_row == position), SURFACES[position]
        attributes = {a: examples.attributes[a.field][rows] for a in table.attributes}
        parties = table.party_utilities_of_rows(surface, probabilities[rows], attributes)
        result[rows] = table.combine(surface, parties)
    return result


class ExampleBuilder:
    """Builds the examples of one model from one action log."""

    def __init__(
        self,
        log: ActionLog,
        vectors: PinVectors,
        manifest: Manifest,
        split: Split,
        sampling: Sampling,
        seed: int,
        encoders: Sequence[UserEncoder] = (),
    ) -> None:
        self._log = log
        self._manifest = manifest
        self._groups = Groups.served_by(manifest, encoders)
        self._vectors = vectors
        self._assembler = Assembler(manifest)
        self._columns = [log.schema.position(head.name) for head in manifest.heads]
        self._split = split
        self._sampling = sampling
        self._seed = seed

    def build(
        self,
        part: Part,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        attributes: Sequence[str] = (),
    ) -> Examples:
        """Build the examples of one part.

        Args:
            part: the part of the split.
            progress: receives the number of finished slices and of all slices.
            attributes: scalar and categorical fields of the pin group to keep besides the tensors.

        Raises:
            DatasetError: the part has no request.
        """
        slices = part_slices(self._log, self._split, part)
        share = self._kept_share(part)
        built: list[Examples] = []
        for done, span in enumerate(slices, start=1):
            built += self.build_slice(span, part, share, attributes)
            progress(done, len(slices))
        if not built:
            raise DatasetError(f"the {part} part of the data has no request; use more data or another split")
        return Examples.concat(built)

    def available(self, part: Part) -> int:
        """Return about how many requests a part has without a maximum: those without new pins are counted, too."""
        rng = np.random.default_rng(0)
        return sum(len(slice_requests(self._log, span, 0, rng)) for span in part_slices(self._log, self._split, part))

    def _kept_share(self, part: Part) -> float:
        if self._sampling.requests_max is None:
            return 1.0
        return min(1.0, self._sampling.requests_max / max(1, self.available(part)))

    def build_slice(
        self, span: Slice, part: Part, share: float = 1.0, attributes: Sequence[str] = ()
    ) -> list[Examples]:
        """Build the examples of one slice, one item per request, for a random `share` of its requests."""
        log = self._log
        # Each slice has its own generator, so that its draws cannot depend on the events of another slice.
        rng = np.random.default_rng([self._seed, span.number])
        requests = slice_requests(log, span, self._manifest.sequence_length, rng)
        keep = rng.random(len(requests)) < share
        asking = np.unique([request.user for request, kept in zip(requests, keep, strict=True) if kept]).astype(int)
        vectors = self._vectors.as_of(log, span.start_ms)
        snapshot = FeatureSnapshot.at(span, log, self._groups, vectors, self._columns, asking)
        new_to_users = [self._without_repeats(request) for request, kept in zip(requests, keep, strict=True) if kept]
        return [
            self._build_request(request, snapshot, part, rng, attributes)
            for request in new_to_users
            if len(request.chosen)
        ]

    def _without_repeats(self, request: Request) -> Request:
        """Drop pins that the user has acted on before, as candidate generators do.

        Sampled pins never occur in the user's sequence, so a candidate that does would give itself away.
        """
        start = self._log.user_splits[request.user]
        before = self._log.pin[self._log.by_user[start : start + request.activity]]
        new = ~np.isin(self._log.pin[request.chosen], before)
        return replace(request, chosen=request.chosen[new])

    def _build_request(
        self,
        request: Request,
        snapshot: FeatureSnapshot,
        part: Part,
        rng: np.random.Generator,
        attributes: Sequence[str],
    ) -> Examples:
        log = self._log
        acted, at = np.unique(log.pin[request.chosen], return_inverse=True)
        wanted = self._sampling.negatives if part == "train" else self._sampling.candidates - len(acted)
        candidates = np.concatenate([acted, self._draw(request.user, wanted, snapshot, rng)])
        labels = np.zeros((len(candidates), len(self._columns)), np.float32)
        np.maximum.at(labels, at, log.labels[request.chosen][:, self._columns].astype(np.float32))
        # The order of the candidates must reveal nothing.
        order = rng.permutation(len(candidates))
        fetched = self.fetched(request, candidates[order], snapshot.pins, snapshot.users)
        batch = self._assembler.assemble(fetched, request.surface)
        ages_s = np.full((1, self._manifest.sequence_length), np.inf, np.float32)
        ages_s[0, : len(request.history)] = (request.time_ms - log.time_ms[request.history]) / 1000
        return Examples(
            batch,
            labels[order],
            snapshot.popularity[candidates[order]],
            np.array([request.user]),
            np.array([request.activity]),
            ages_s,
            np.array([SURFACES.index(request.surface)], np.uint8),
            candidates[order],
            np.array([snapshot.as_of_ms]),
            {name: snapshot.pins.rows[name][candidates[order]] for name in attributes},
        )

    def fetched(
        self, request: Request, candidates: np.ndarray, pins: Rows, users: Mapping[str, Rows]
    ) -> FetchedFeatures:
        """Return what a fetch at the time of the request would have returned.

        Args:
            request: the request.
            candidates: int64[N], positions in `log.pin_ids`.
            pins: rows of all pins at that time.
            users: by group, rows of all users at that time.
        """
        log = self._log
        query, sequence = request.query_pin, self._groups.sequence
        events = np.empty(0, SequenceGroup.dtype) if sequence is None else events_of(log, request.history, sequence)
        acted = log.pin[request.history][: len(events)]
        wanted = np.concatenate([candidates, acted, [] if query is None else [query]]).astype(np.int64)
        return FetchedFeatures(
            user={name: Rows(own.rows[[request.user]], own.states[[request.user]]) for name, own in users.items()},
            pins={PIN_GROUP: Rows(pins.rows[wanted], pins.states[wanted])},
            candidates=len(candidates),
            events=events,
            has_query_pin=query is not None,
            sequence_state=RowState.PRESENT if len(events) else RowState.MISSING,
            read_ms=request.time_ms,
        )

    def _draw(self, user: int, count: int, snapshot: FeatureSnapshot, rng: np.random.Generator) -> np.ndarray:
        log = self._log
        own = log.pin[log.by_user[log.user_splits[user] : log.user_splits[user + 1]]]
        eligible = snapshot.known.copy()
        eligible[own] = False
        known, new = np.flatnonzero(eligible), np.setdiff1d(snapshot.new_pins, own)
        count = max(0, count)
        news = min(int(rng.binomial(count, snapshot.new_share)), len(new))
        return np.concatenate(
            [
                rng.choice(known, min(count - news, len(known)), replace=False),
                rng.choice(new, news, replace=False),
            ]
        )


@dataclass(frozen=True, slots=True)
class FeatureSnapshot:
    """All stored features as of the start of a slice.

    Attributes:
        as_of_ms: Unix time in milliseconds; no later event is read.
        pins: in the order of `log.pin_ids`.
        users: by group, in the order of `log.user_ids`.
        popularity: float32[P, H].
        known: bool[P], pins with an event before the slice.
        new_pins: int64[K], pins whose first event lies in the slice.
        new_share: share of the slice's events that are on new pins.
    """

    as_of_ms: int
    pins: Rows
    users: Mapping[str, Rows]
    popularity: np.ndarray
    known: np.ndarray
    new_pins: np.ndarray
    new_share: float

    @staticmethod
    def at(
        span: Slice,
        log: ActionLog,
        groups: Groups,
        vectors: np.ndarray,
        columns: Sequence[int],
        asking: np.ndarray | None = None,
    ) -> FeatureSnapshot:
        """Compute the features as of the start of a slice.

        Args:
            span: the slice.
            log: the history.
            groups: the groups of the features.
            vectors: float16[P, D], the embeddings of the pins, zeros for pins without one.
            columns: which actions of the schema are counted for `popularity`.
            asking: int64[N], positions of users, each once: others have the default rows in further groups, which
                take about 1 ms a user. None for all.
        """
        stop = log.before(span.start_ms)
        folded = folded_in(log, vectors, stop)
        pins = pin_rows(log, groups.pin, vectors, span.start_ms, folded)
        users = user_rows(log, groups.user, vectors, span.start_ms, folded)
        further = rows_by_group(groups.further, log, pins.rows["embedding"], span.start_ms, asking)
        acted = log.pin[stop : log.before(span.stop_ms)]
        known = np.bincount(log.pin[:stop], minlength=len(log.pin_ids)) > 0
        on_new = ~known[acted]
        counts = [np.bincount(log.pin[:stop], log.labels[:stop, column], len(log.pin_ids)) for column in columns]
        return FeatureSnapshot(
            span.start_ms,
            pins,
            {USER_GROUP: users, **{name: Rows(rows, users.states) for name, rows in further.items()}},
            np.stack(counts, axis=-1).astype(np.float32),
            known,
            np.unique(acted[on_new]),
            float(on_new.mean()) if len(on_new) else 0.0,
        )
