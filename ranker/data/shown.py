"""Requests that a server answered, from a joined dataset of its impression log, beside a dataset's interactions.

The joined dataset says who asked and when, which pins were shown, and what the user did with each. The interactions
give the stored features. What a user had done before a request comes from both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from impressions.dataset import Manifest, flat, labels_of, read_manifest, read_requests, read_unattributed, row_splits
from impressions.slates import holds_all
from ranker.data.actions import ActionLog, strongest_action
from ranker.data.features import SURFACES
from ranker.data.requests import Part, Slice, Split, request_slices
from ranker.data.schema import FILE, ActionSchema
from ranker.errors import DatasetError, SettingError


@dataclass(frozen=True, slots=True)
class Impressions:
    """A joined dataset to train from.

    Attributes:
        folder: what `pinrank impressions join --out` wrote.
        with_unseen: whether pins that the user did not look at, as reported, count as not acted on; otherwise they are
            left out.
    """

    folder: Path
    with_unseen: bool = False


@dataclass(frozen=True, slots=True)
class ShownRequests:
    """R answered requests, oldest first, with N shown pins.

    Attributes:
        users: int64[R], positions in `user_ids` of the logs.
        time_ms: int64[R], ascending.
        surfaces: uint8[R], positions in `SURFACES`.
        query_pins: int64[R], positions in `pin_ids` of the logs; -1 for a request that starts from no pin.
        row_splits: int64[R + 1], where the rows of each request begin.
        pins: int64[N], positions in `pin_ids`.
        positions: int64[N], in the answer, from 0.
        places: int64[N], in the request's candidates.
        propensities: float64[N], of the pin at its position.
        labels: bool[N, A], the actions of the schema.
        stored_rows: the encoded rows that were read for each request; None where the log has none, or if not asked for.
    """

    users: np.ndarray
    time_ms: np.ndarray
    surfaces: np.ndarray
    query_pins: np.ndarray
    row_splits: np.ndarray
    pins: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    propensities: np.ndarray
    labels: np.ndarray
    stored_rows: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """Logged requests, and all actions around them. Both logs know the same users and pins.

    Attributes:
        dataset: the interactions of the dataset, from which features derive.
        history: these and the actions of the joined dataset, each once.
        requests: those with a pin to learn from, and these pins only.
        whole: those whose answers hold all their candidates, seen or not, in the order of the candidates.
        cut_ms: int64[C], the times of the others.
        split_ms: int64[S], ascending, the times whose shares bound the parts: those of the requests to learn from.
        inputs_sha256: the digest of what was joined.
        notes: what a user should know about the data.
    """

    dataset: ActionLog
    history: ActionLog
    requests: ShownRequests
    whole: ShownRequests
    cut_ms: np.ndarray
    split_ms: np.ndarray
    inputs_sha256: str
    notes: tuple[str, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads of the schema that some shown pin received; the others cannot be learned."""
        schema = self.history.schema
        return tuple(head for head in schema.heads if self.requests.labels[:, schema.position(head)].any())

    def slices(self, split: Split, part: Part) -> list[Slice]:
        """Divide a part into slices (see `request_slices`)."""
        return request_slices(self.split_ms, split, part)


def read_shown(
    impressions: Impressions, log: ActionLog, *, since_ms: int | None = None, stored_rows: bool = False
) -> Shown:
    """Read a joined dataset beside the interactions of a dataset.

    Args:
        impressions: the joined dataset.
        log: the interactions.
        since_ms: leave out requests before this Unix time in milliseconds; their actions stay in the history.
        stored_rows: whether to read the stored rows that the log keeps for a share of the requests.

    Raises:
        JoinError: the folder is not a joined dataset.
        SettingError: it has an action or surface that the dataset does not.
        DatasetError: it has no request to learn from, or none that is newer than an interaction.
    """
    manifest = read_manifest(impressions.folder)
    _check_vocabulary(manifest, log.schema, impressions.folder)
    parts = [_Part.of(table, manifest, log.schema) for table in read_requests(impressions.folder, _COLUMNS)]
    if not parts:
        raise DatasetError(f"{impressions.folder} has no request")
    columns = _Part(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS})
    joined = _Events.concat(
        [_Events.attributed(columns), _Events.of(read_unattributed(impressions.folder), log.schema)]
    )
    user_ids = np.unique(np.concatenate([log.user_ids, columns.user_ids, joined.user_ids]))
    pin_ids = np.unique(np.concatenate([log.pin_ids, columns.pin_ids, joined.pin_ids, _queries(columns)]))
    dataset = _with_ids(log, user_ids, pin_ids)
    usable = ~columns.has_vector & (columns.time_ms >= (0 if since_ms is None else since_ms))
    wanted = (columns.seen | impressions.with_unseen) & usable[columns.owners]
    stored = _stored_rows(impressions.folder) if stored_rows else [None] * len(columns.counts)
    whole = usable & holds_all(columns.counts, columns.candidates)
    by_place = np.lexsort((columns.places, columns.owners))  # the rows of a request stay together
    requests, answers = (
        _requests(columns, rows, user_ids, pin_ids, stored)
        for rows in (np.flatnonzero(wanted), by_place[whole[columns.owners]])
    )
    _check_times(requests, dataset, impressions.folder, since_ms)
    return Shown(
        dataset,
        _merged(dataset, joined),
        requests,
        answers,
        columns.time_ms[usable & ~whole],
        requests.time_ms,
        manifest.inputs_sha256,
        tuple(_notes(columns, log, impressions.with_unseen)),
    )


_COLUMNS = (
    *("group", "request_id", "time_ms", "user_id", "query_pin_id", "query_vector", "pin_ids", "places"),
    *("candidates", "propensities", "seen", "outcomes"),
)


@dataclass(frozen=True, slots=True)
class _Part:
    """Columns of the joined dataset: of R requests, N shown pins and J actions."""

    time_ms: np.ndarray
    user_ids: np.ndarray
    surfaces: np.ndarray
    query_pin_ids: np.ndarray
    has_query: np.ndarray
    has_vector: np.ndarray
    candidates: np.ndarray
    counts: np.ndarray
    pin_ids: np.ndarray
    places: np.ndarray
    positions: np.ndarray
    propensities: np.ndarray
    seen: np.ndarray
    labels: np.ndarray
    acted_users: np.ndarray
    acted_pins: np.ndarray
    acted_ms: np.ndarray
    acted: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """int64[N], the request of each shown pin."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @staticmethod
    def of(table: pa.Table, manifest: Manifest, schema: ActionSchema) -> _Part:
        splits = row_splits(table["pin_ids"])
        counts, pin_ids = np.diff(splits), flat(table["pin_ids"])
        surface_of_group = np.array([SURFACES.index(group.surface) for group in manifest.groups], np.uint8)
        outcomes = pa.chunked_array([c.flatten() for c in table["outcomes"].chunks], table["outcomes"].type.value_type)
        actions_of = np.diff(row_splits(table["outcomes"]))
        acted_rows = np.repeat(splits[:-1], actions_of) + pc.struct_field(outcomes, "position").to_numpy()
        return _Part(
            time_ms=table["time_ms"].to_numpy(),
            user_ids=table["user_id"].to_numpy(),
            surfaces=surface_of_group[table["group"].to_numpy()],
            query_pin_ids=table["query_pin_id"].fill_null(0).to_numpy(),
            has_query=table["query_pin_id"].is_valid().to_numpy(),
            has_vector=table["query_vector"].is_valid().to_numpy(),
            candidates=table["candidates"].to_numpy().astype(np.int64),
            counts=counts,
            pin_ids=pin_ids,
            places=flat(table["places"]).astype(np.int64),
            positions=np.arange(splits[-1]) - np.repeat(splits[:-1], counts),
            propensities=flat(table["propensities"]),
            seen=flat(table["seen"]),
            labels=labels_of(table["outcomes"], splits, schema.names),
            acted_users=np.repeat(table["user_id"].to_numpy(), actions_of),
            acted_pins=pin_ids[acted_rows],
            acted_ms=pc.struct_field(outcomes, "time_ms").to_numpy(),
            acted=_positions_of(pc.struct_field(outcomes, "action"), schema),
        )


_FIELDS = tuple(_Part.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class _Events:
    """J actions of the log, by ids; `action` holds positions in the schema."""

    user_ids: np.ndarray
    pin_ids: np.ndarray
    time_ms: np.ndarray
    action: np.ndarray

    @staticmethod
    def attributed(part: _Part) -> _Events:
        return _Events(part.acted_users, part.acted_pins, part.acted_ms, part.acted)

    @staticmethod
    def of(table: pa.Table, schema: ActionSchema) -> _Events:
        return _Events(
            table["user_id"].to_numpy(),
            table["pin_id"].to_numpy(),
            table["time_ms"].to_numpy(),
            _positions_of(table["action"], schema),
        )

    @staticmethod
    def concat(parts: Iterable[_Events]) -> _Events:
        names, found = ("user_ids", "pin_ids", "time_ms", "action"), list(parts)
        return _Events(*(np.concatenate([getattr(part, name) for part in found]) for name in names))


def _check_vocabulary(manifest: Manifest, schema: ActionSchema, folder: Path) -> None:
    foreign = [name for name in manifest.actions if name not in schema.names]
    if foreign:
        raise SettingError(
            f"{folder} has the action {foreign[0]!r}, which the dataset does not define; its actions are "
            f"{', '.join(schema.names)}. Add it to {FILE} beside the data, or pass --actions FILE"
        )
    others = sorted({group.surface for group in manifest.groups} - set(SURFACES))
    if others:
        raise SettingError(
            f"{folder} has requests of surface {others[0]!r}, and models trained here rank {' and '.join(SURFACES)}; "
            "join again with " + " ".join(f"--surface {surface}" for surface in SURFACES)
        )


def _check_times(requests: ShownRequests, log: ActionLog, folder: Path, since_ms: int | None) -> None:
    if not len(requests.time_ms):
        newer = "" if since_ms is None else " that is newer than what the parent learned from"
        raise DatasetError(f"{folder} has no request with a seen pin{newer}; join a longer span, or add --with-unseen")
    if since_ms is None and not log.before(int(requests.time_ms[0])):
        raise DatasetError(
            "no interaction of --data is older than the first request of --impressions, so there is nothing to fit "
            "embeddings on; export older interactions, or join from a later time on (--since)"
        )


def _positions_of(names: pa.ChunkedArray, schema: ActionSchema) -> np.ndarray:
    found = pc.index_in(names, pa.array(schema.names, pa.string()))
    return np.asarray(found.to_numpy(), np.int64)


def _queries(part: _Part) -> np.ndarray:
    queries: np.ndarray = part.query_pin_ids[part.has_query]
    return queries


def _requests(
    part: _Part, rows: np.ndarray, user_ids: np.ndarray, pin_ids: np.ndarray, stored: Sequence[bytes | None]
) -> ShownRequests:
    """Return the requests that have one of these rows, with these rows only; they are sorted by request."""
    counts = np.bincount(part.owners[rows], minlength=len(part.counts))
    kept = counts > 0
    return ShownRequests(
        users=np.searchsorted(user_ids, part.user_ids[kept]),
        time_ms=part.time_ms[kept],
        surfaces=part.surfaces[kept],
        query_pins=np.where(part.has_query, np.searchsorted(pin_ids, part.query_pin_ids), -1)[kept],
        row_splits=np.concatenate([[0], np.cumsum(counts[kept])]),
        pins=np.searchsorted(pin_ids, part.pin_ids[rows]),
        positions=part.positions[rows],
        places=part.places[rows],
        propensities=part.propensities[rows],
        labels=part.labels[rows],
        stored_rows=tuple(compress(stored, kept)),
    )


def _stored_rows(folder: Path) -> list[bytes | None]:
    return [value.as_py() for table in read_requests(folder, ["features"]) for value in table["features"]]


def _with_ids(log: ActionLog, user_ids: np.ndarray, pin_ids: np.ndarray) -> ActionLog:
    """Return the same events with more users and pins, of which nothing is known."""
    user = np.searchsorted(user_ids, log.user_ids)[log.user]
    pin = np.searchsorted(pin_ids, log.pin_ids)[log.pin]
    return _log(log, user_ids, pin_ids, user, pin, log.time_ms, log.labels)


def _merged(log: ActionLog, joined: _Events) -> ActionLog:
    """Add actions to a log. One that the log has, of the same user, pin, time and kind, counts once."""
    user, pin = np.searchsorted(log.user_ids, joined.user_ids), np.searchsorted(log.pin_ids, joined.pin_ids)
    ours = np.stack([user, pin, joined.time_ms, joined.action], axis=1).astype(np.int64)
    late = np.flatnonzero(log.time_ms >= (joined.time_ms.min() if len(joined.time_ms) else np.inf))
    event, action = np.nonzero(log.labels[late])
    theirs = np.stack([log.user[late][event], log.pin[late][event], log.time_ms[late][event], action], axis=1)
    known = np.unique(theirs.astype(np.int64), axis=0)
    _, inverse = np.unique(np.concatenate([known, ours]), axis=0, return_inverse=True)
    codes = inverse.reshape(-1)
    new = ~np.isin(codes[len(known) :], codes[: len(known)])
    labels = np.zeros((int(new.sum()), log.labels.shape[1]), bool)
    labels[np.arange(len(labels)), joined.action[new]] = True
    time_ms = np.concatenate([log.time_ms, joined.time_ms[new]])
    order = np.argsort(time_ms, kind="stable")
    return _log(
        log,
        log.user_ids,
        log.pin_ids,
        np.concatenate([log.user, user[new]])[order],
        np.concatenate([log.pin, pin[new]])[order],
        time_ms[order],
        np.concatenate([log.labels, labels])[order],
    )


def _log(
    like: ActionLog,
    user_ids: np.ndarray,
    pin_ids: np.ndarray,
    user: np.ndarray,
    pin: np.ndarray,
    time_ms: np.ndarray,
    labels: np.ndarray,
) -> ActionLog:
    counts = np.bincount(user, minlength=len(user_ids))
    return replace(
        like,
        user_ids=user_ids,
        pin_ids=pin_ids,
        user=user,
        pin=pin,
        time_ms=time_ms,
        labels=labels,
        action=strongest_action(labels),
        by_user=np.argsort(user, kind="stable"),
        user_splits=np.concatenate([[0], np.cumsum(counts)]),
    )


def _notes(part: _Part, log: ActionLog, with_unseen: bool) -> Iterable[str]:
    for what, found, known in (("users", part.user_ids, log.user_ids), ("pins", part.pin_ids, log.pin_ids)):
        distinct = np.unique(found)
        unknown = int(np.count_nonzero(~np.isin(distinct, known)))
        if unknown:
            yield (
                f"{unknown:,} of {len(distinct):,} {what} in the impressions do not occur in the data; their features "
                "count as missing"
            )
    if not with_unseen and not part.seen.all():
        yield f"{int((~part.seen).sum()):,} of {len(part.seen):,} shown pins were not seen and are left out"
    if part.has_vector.any():
        yield f"{int(part.has_vector.sum()):,} requests start from a query vector and are left out"
