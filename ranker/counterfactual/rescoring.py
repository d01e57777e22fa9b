"""Scores logged answers with another network than the one that logged, from the stored rows that the log keeps.

A server keeps the rows that it read for a share of the answers, which a hash of the request's id chooses. So these
answers are a random sample of all, and what holds for them on average holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from feature_client.features import FetchedFeatures
from impressions.dataset import read_requests
from impressions.slates import Slates
from kernels.engine import EngineError, EngineFactory, UnavailableError
from model_store.bundle.files import UTILITY, Bundle
from model_store.bundle.golden import decode_golden
from model_store.bundle.manifest import Manifest
from model_store.model.loaded import LoadedModel, load_model
from model_store.model.utility import UtilityError, UtilityTable, load_utility, weighted_sum
from ranker.counterfactual.policies import party_utilities
from ranker.errors import PropensityError

_COLUMNS = ("request_id", "time_ms", "query_vector", "places", "features")


@dataclass(frozen=True, slots=True)
class Rescoring:
    """Which answers another network scored, of all that were logged.

    Attributes:
        models: "name@version" of the networks that scored the answers again.
        logged_requests: how many answers the log has.
        share: the part of them that keeps the stored rows; only these are evaluated.
        logged_explored_share: the part of all answers that explored.
    """

    models: tuple[str, ...]
    logged_requests: int
    share: float
    logged_explored_share: float


def score_again(
    folder: Path,
    slates: Slates,
    logged: Manifest,
    bundles: Sequence[Bundle],
    factory: EngineFactory,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Slates, list[Slates]]:
    """Score the answers that keep their stored rows, one by one and with all their candidates, as a server does.

    Args:
        folder: the joined dataset that the answers were read from.
        slates: the answers. The join leaves out those of trimmed requests, so each pin was scored.
        logged: the manifest of the version that logged them.
        bundles: other versions.
        factory: opens the engine. Probabilities are those of a server to the bit if it scores each request by itself in
            float32 with the same engine; otherwise they differ by no more than golden scores may.
        progress: receives the number of answers done, and of all.

    Returns:
        The answers that keep their stored rows; and for each bundle the same answers with its heads, parties,
        attributes and tuned weights, in the logged order.

    Raises:
        PropensityError: no answer keeps its stored rows, or they are not what a bundle reads.
        BundleError: a bundle cannot be loaded.
    """
    kept = np.zeros(slates.requests, bool)
    with ExitStack() as opened:
        networks = [_Network.opened(bundle, logged, slates, factory) for bundle in bundles]
        for network in networks:
            opened.callback(network.model.engine.close)
        for request, row in _rows(folder, slates):
            pins = slice(slates.row_splits[request], slates.row_splits[request + 1])
            for network in networks:
                network.score(row, pins)
            kept[request] = True
            progress(request + 1, slates.requests)
    if not kept.any():
        refs = " and ".join(bundle.manifest.ref for bundle in bundles)
        raise PropensityError(
            f"{refs} has another network or calibration than {slates.model}, which logged, so its probabilities follow "
            "from the stored rows that the server read, and no answer of this log keeps them. Set "
            "impressions.features_share on the servers (0.1 keeps them for a tenth of the answers), then log and join "
            "again; or evaluate its utility table alone (--policy utility.toml); or serve it as a canary and evaluate "
            "on its own log"
        )
    return slates.where(kept), [network.slates(slates).where(kept) for network in networks]


@dataclass(frozen=True, slots=True)
class _Network:
    """A version, and what it thinks of all N shown pins: NaN until they are scored.

    Attributes:
        probabilities: float32[N, H].
        attributes: float64[N, A], what its utility table reads of the pins.
    """

    model: LoadedModel
    table: UtilityTable
    surface: str
    probabilities: np.ndarray
    attributes: np.ndarray

    @staticmethod
    def opened(bundle: Bundle, logged: Manifest, slates: Slates, factory: EngineFactory) -> _Network:
        _check_reads(bundle.manifest, logged, slates.surface)
        try:
            table = load_utility(bundle.files[UTILITY], bundle.manifest)
        except UtilityError as error:
            raise PropensityError(f"{bundle.manifest.ref}: {error}") from error
        model = load_model(bundle, factory, streams=1, warm=False)  # no request waits for a run
        rows = len(slates.pin_ids)
        return _Network(
            model,
            table,
            slates.surface,
            np.full((rows, len(table.heads)), np.nan, np.float32),
            np.full((rows, len(table.attributes)), np.nan),
        )

    def score(self, row: dict[str, Any], pins: slice) -> None:
        """Score one answer, whose shown pins are these rows."""
        model, vector = self.model, row["query_vector"]
        try:
            (golden,) = decode_golden(row["features"])
            fetched = self._as_read(golden.fetched, row["time_ms"])
            query = None if vector is None else np.array(vector, np.float32)
            batch = model.assembler.assemble(fetched, self.surface, query)
            places = np.array(row["places"], np.int64)
            self.probabilities[pins] = model.probabilities(model.engine.run(batch))[places]
            for column, attribute in enumerate(self.table.attributes):
                self.attributes[pins, column] = fetched.candidate_rows(attribute.group)[attribute.field][places]
        except UnavailableError:
            raise
        except (EngineError, ValueError, IndexError, KeyError) as error:
            raise PropensityError(
                f"{model.manifest.ref} cannot score the stored rows of request {row['request_id']}: {error}; join the "
                "log again, from when servers read the present feature groups on (--since)"
            ) from error

    def _as_read(self, fetched: FetchedFeatures, time_ms: int) -> FetchedFeatures:
        """Return the features with as many actions as the model reads; the version that logged may read more.

        `time_ms` is when the request was answered; older logs do not hold when its features were read.
        """
        fetched = replace(fetched, read_ms=fetched.read_ms or time_ms)
        length = self.model.manifest.sequence_length
        if len(fetched.events) <= length:
            return fetched
        return fetched.part(np.arange(fetched.candidates), length)

    def slates(self, logged: Slates) -> Slates:
        """Return the answers as this version scores them."""
        own = self.table.surfaces[self.surface]
        scored = replace(
            logged,
            model=self.model.manifest.ref,
            utility_digest=self.table.digest,
            heads=self.table.heads,
            parties=own.parties,
            attributes=tuple(attribute.name for attribute in self.table.attributes),
            party_weights=np.tile(own.weights, (logged.requests, 1)),
            probabilities=self.probabilities,
            attribute_values=self.attributes,
        )
        parties = party_utilities(own, scored)
        return replace(scored, party_utilities=parties, utilities=weighted_sum(parties, own.weights))


def _rows(folder: Path, slates: Slates) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the position of each answer that keeps its stored rows, and its columns."""
    if not slates.requests:
        return
    order = np.argsort(slates.request_ids)
    ids = slates.request_ids[order]
    since_ms, until_ms = int(slates.time_ms.min()), int(slates.time_ms.max()) + 1
    for table in read_requests(folder, _COLUMNS, since_ms=since_ms, until_ms=until_ms):
        for row in table.filter(pc.is_valid(table["features"])).to_pylist():
            place = int(np.searchsorted(ids, np.uint64(row["request_id"])))
            if place < len(ids) and ids[place] == row["request_id"]:
                yield int(order[place]), row


def _check_reads(manifest: Manifest, logged: Manifest, surface: str) -> None:
    """Refuse a version whose features are not those that the version that logged read."""
    if surface not in {one.name for one in manifest.surfaces}:
        raise PropensityError(
            f"{manifest.ref} does not rank the surface {surface}; choose another version or --surface"
        )
    known = {group.name: group for group in logged.groups}
    lacking = [g.ref for g in manifest.groups if g.name not in known or known[g.name].fingerprint != g.fingerprint]
    sequence, length = manifest.sequence, manifest.sequence_length
    if sequence is not None and (logged.sequence is None or logged.sequence.fingerprint != sequence.fingerprint):
        lacking.append(sequence.ref)
    elif length > logged.sequence_length:
        lacking.append(f"{length} actions instead of {logged.sequence_length}")
    space, other = manifest.query_space, logged.query_space
    if space is not None and other is not None and space != other:
        lacking.append(f"queries of the embedding space {space.ref}")
    if lacking:
        raise PropensityError(
            f"{manifest.ref} reads {', '.join(lacking)}, and {logged.ref}, which logged, did not, or defines it "
            "differently; so the stored rows are not what it would have read. Serve it as a canary and evaluate on its "
            "own log"
        )
