"""Answered requests as input tensors and labels: real requests, real negatives, and where each pin was shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from feature_client.features import FetchedFeatures
from model_store.bundle.golden import decode_golden
from model_store.bundle.manifest import Manifest
from model_store.model.assembly import Assembler
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinVectors
from ranker.data.features import PIN_GROUP, SURFACES, Groups
from ranker.data.requests import Part, Request, Slice, Split
from ranker.data.shown import Shown
from ranker.data.users.rows import UserEncoder
from ranker.errors import DatasetError
from ranker.training.examples import ExampleBuilder, Examples, FeatureSnapshot, Sampling


class ShownExampleBuilder:
    """Builds the examples of one model from answered requests.

    Features are as of the start of a request's slice, or the stored rows that the log keeps with the request. The
    history is what the user had done strictly before the request.
    """

    def __init__(
        self,
        shown: Shown,
        vectors: PinVectors,
        manifest: Manifest,
        split: Split,
        sampling: Sampling,
        seed: int,
        encoders: Sequence[UserEncoder] = (),
    ) -> None:
        self._shown, self._manifest, self._split, self._sampling = shown, manifest, split, sampling
        self._seed = seed
        self._groups = Groups.served_by(manifest, encoders)
        self._vectors = vectors
        self._assembler = Assembler(manifest)
        self._columns = [shown.history.schema.position(head.name) for head in manifest.heads]
        self._fetch = ExampleBuilder(shown.history, vectors, manifest, split, sampling, seed).fetched

    def build(
        self,
        part: Part,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        attributes: Sequence[str] = (),
    ) -> Examples:
        """Build the examples of one part. Arguments and errors are those of `ExampleBuilder.build`."""
        time_ms = self._shown.requests.time_ms
        slices = self._shown.slices(self._split, part)
        bounds = [np.searchsorted(time_ms, (span.start_ms, span.stop_ms)) for span in slices]
        wanted = self._sampling.requests_max
        share = 1.0 if wanted is None else min(1.0, wanted / max(1, self.available(part)))
        built: list[Examples] = []
        for done, (span, (start, stop)) in enumerate(zip(slices, bounds, strict=True), start=1):
            keep = np.random.default_rng([self._seed, span.number]).random(stop - start) < share
            built += self._build_slice(span, start + np.flatnonzero(keep), attributes)
            progress(done, len(slices))
        if not built:
            raise DatasetError(
                f"the {part} part of the impressions has no request; join a longer span, or raise --requests-max"
            )
        return Examples.concat(built)

    def available(self, part: Part) -> int:
        """Return how many requests a part has without a maximum."""
        time_ms = self._shown.requests.time_ms
        slices = self._shown.slices(self._split, part)
        bounds = [np.searchsorted(time_ms, (span.start_ms, span.stop_ms)) for span in slices]
        return sum(int(stop - start) for start, stop in bounds)

    def _build_slice(self, span: Slice, numbers: np.ndarray, attributes: Sequence[str]) -> list[Examples]:
        if not len(numbers):
            return []
        asking = np.unique(self._shown.requests.users[numbers])
        log = self._shown.dataset
        vectors = self._vectors.as_of(log, span.start_ms)
        snapshot = FeatureSnapshot.at(span, log, self._groups, vectors, self._columns, asking)
        return [self._build_request(int(number), snapshot, attributes) for number in numbers]

    def _build_request(self, number: int, snapshot: FeatureSnapshot, attributes: Sequence[str]) -> Examples:
        requests = self._shown.requests
        rows = slice(requests.row_splits[number], requests.row_splits[number + 1])
        pins = requests.pins[rows]
        request = self._request(number)
        stored = requests.stored_rows[number]
        fetched = self._fetch(request, pins, snapshot.pins, snapshot.users)
        if stored is not None:
            fetched = self._as_read(stored, requests.places[rows], request.time_ms)
        ages_s = np.full((1, self._manifest.sequence_length), np.inf, np.float32)
        acted_ms = fetched.events["time_ms"] if stored is not None else self._shown.history.time_ms[request.history]
        acted_ms = acted_ms[: self._manifest.sequence_length]
        ages_s[0, : len(acted_ms)] = np.maximum(request.time_ms - acted_ms, 0) / 1000
        return Examples(
            self._assembler.assemble(fetched, SURFACES[requests.surfaces[number]]),
            requests.labels[rows][:, self._columns].astype(np.float32),
            snapshot.popularity[pins],
            np.array([request.user]),
            np.array([request.activity]),
            ages_s,
            requests.surfaces[number : number + 1],
            pins,
            np.array([snapshot.as_of_ms]),
            {name: fetched.pins[PIN_GROUP].rows[name][: len(pins)] for name in attributes},
            requests.positions[rows],
            requests.propensities[rows],
        )

    def _request(self, number: int) -> Request:
        requests, history = self._shown.requests, self._shown.history
        user, time_ms = int(requests.users[number]), int(requests.time_ms[number])
        own = history.by_user[history.user_splits[user] : history.user_splits[user + 1]]
        known = int(np.searchsorted(history.time_ms[own], time_ms))
        query = int(requests.query_pins[number])
        return Request(
            user=user,
            time_ms=time_ms,
            chosen=np.empty(0, np.int64),
            history=own[max(0, known - self._manifest.sequence_length) : known][::-1],
            activity=known,
            query_pin=None if query < 0 else query,
        )

    def _as_read(self, stored: bytes, places: np.ndarray, time_ms: int) -> FetchedFeatures:
        """Return the rows that the server read for the request, for the pins at these places of its candidates.

        `time_ms` is when it answered; older logs do not hold when it read.

        Raises:
            DatasetError: they are not rows of the groups that the model reads.
        """
        try:
            (golden,) = decode_golden(stored)
            fetched = golden.fetched
            for group in (self._groups.pin, *self._groups.of_users):
                found = (fetched.user if group.entity == "user" else fetched.pins).get(group.name)
                if found is None or found.rows.dtype != group.dtype:
                    names = () if found is None else found.rows.dtype.names
                    raise DatasetError(
                        f"a request's stored rows of group {group.name} have the fields {names}, and the model "
                        f"reads {group.dtype.names}; join from when servers read the present groups on (--since)"
                    )
            length = self._manifest.sequence_length or len(fetched.events)
            return replace(fetched.part(places, length), read_ms=fetched.read_ms or time_ms)
        except (ValueError, IndexError, KeyError) as error:
            raise DatasetError(f"the stored rows of a request cannot be read: {error}; join again") from error


def example_builder(
    log: ActionLog,
    shown: Shown | None,
    vectors: PinVectors,
    manifest: Manifest,
    split: Split,
    sampling: Sampling,
    seed: int,
    encoders: Sequence[UserEncoder] = (),
) -> ExampleBuilder | ShownExampleBuilder:
    """Return what builds examples: of answered requests if there are any, else of requests made up of the log."""
    if shown is None:
        return ExampleBuilder(log, vectors, manifest, split, sampling, seed, encoders)
    return ShownExampleBuilder(shown, vectors, manifest, split, sampling, seed, encoders)
