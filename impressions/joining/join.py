"""A log's requests, joined with the actions that they led to and with what users looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from impressions.dataset import REQUESTS, UNATTRIBUTED, Counts, Group, JoinError, Manifest, flat, row_splits
from impressions.joining.attribution import REASONS, Actions, Attributed, Attribution, Requests, Window, positions_in
from impressions.joining.buckets import Buckets
from impressions.joining.output import commit, final_name, output_folder, parquet_writer
from impressions.joining.records import ActionCounts, SeenPins, Span, distinct_actions, seen_pins, within_span
from impressions.joining.request_index import INDEXED, LEFT_OUT, RequestIndex, index_requests
from impressions.joining.scores import without_unscored
from impressions.reading import EVERYTHING, Selection
from impressions.schema import IMPRESSIONS, fingerprint

#: Reads what is needed of one table of a log: its files' rows, in any order, as often as it is called.
TableReader = Callable[[str, Selection], Iterable[pa.Table]]
#: Receives the current step, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to join.

    Attributes:
        window: how long after a request an action counts.
        span: when the requests were answered.
        surfaces: the surfaces of the requests; None for all.
    """

    window: Window
    span: Span = field(default_factory=Span)
    surfaces: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.window.after_ms <= 0:
            raise JoinError(
                "--window must be longer than 0, e.g. --window 30m: an action comes after what it is due to"
            )
        if self.window.skew_ms < 0:
            raise JoinError("--clock-skew must not be negative; 0s allows no difference between clocks")
        since_ms, until_ms = self.span.since_ms, self.span.until_ms
        if since_ms is not None and until_ms is not None and since_ms >= until_ms:
            raise JoinError("--since must be before --until; no request can be answered between them")


@dataclass(frozen=True, slots=True)
class Joined:
    """What a join wrote, and how many rows of the log only repeat others."""

    manifest: Manifest
    repeated_requests: int
    repeated_actions: int


def join_log(
    read: TableReader, folder: Path, wanted: Wanted, progress: Progress = lambda _step, _done, _total: None
) -> Joined:
    """Join a log and write the dataset; what the folder held before stays whole until the new dataset is.

    The dataset depends on the set of the log's rows, and not on their order, their files, or how often one is there. A
    join of a span or a surface is that part of the whole join.

    Args:
        read: reads the log's tables.
        folder: where the dataset is, or will be.
        wanted: what to join.
        progress: receives the progress.

    Raises:
        JoinError: the log cannot be joined, or the folder is not a dataset's; nothing was changed.

    Cost: reads ids, users and times of all impressions, and then those of the span; needs two to three times the size
    of these on the disk of `folder`. In memory it holds 50 bytes a request, one byte a pin, 100 bytes an action, and
    some thousands of requests with all columns.
    """
    window = wanted.window
    # An action within the window of a wanted request may belong to one that was answered before or after.
    margin_ms = window.after_ms + window.skew_ms
    # Actions first: while servers write the log, those that are read now have their requests in what is read next.
    every_action, action_counts = distinct_actions(read("actions", EVERYTHING))
    index = index_requests(read("impressions", Selection(INDEXED)), wanted.span, margin_ms)
    in_span = wanted.span.holds(index.requests.time_ms)
    actions = within_span(every_action, in_span, index.requests, window, wanted.span)
    with output_folder(folder) as temporary:
        buckets = Buckets(temporary, index)
        needed = Selection(None, index.rows_span.since_ms, index.rows_span.until_ms)
        for done in buckets.fill(read("impressions", needed)):
            progress("sorting impressions", done, index.rows)
        attribution, groups = Attribution(actions, index.requests, window), np.full(len(in_span), -1)
        for bucket in range(buckets.count):
            table = buckets.sort(bucket)
            numbers = buckets.numbers(table)
            groups[numbers] = table["group"].to_numpy()
            attribution.add(numbers, row_splits(table["pin_ids"]), flat(table["pin_ids"]))
            progress("attributing actions", bucket + 1, buckets.count)
        usable = groups >= 0
        _check_complete(usable | (index.left_out > 0))
        seen = seen_pins(read("seen", EVERYTHING), index.requests, buckets.pin_counts * usable, usable, index.elsewhere)
        scored = buckets.scored_counts
        work = _Work(wanted, index, buckets.groups, groups, in_span, actions, attribution.result(), seen, scored)
        work.check_anything_left()
        made = {"requests": temporary / "requests.parquet", "unattributed": temporary / "unattributed.parquet"}
        with parquet_writer(made["requests"], REQUESTS) as writer:
            for bucket in range(buckets.count):
                part = work.dataset_rows(buckets.take(bucket))
                if part.num_rows:
                    writer.write_table(part, row_group_size=part.num_rows)
                progress("writing the dataset", bucket + 1, buckets.count)
        with parquet_writer(made["unattributed"], UNATTRIBUTED) as writer:
            writer.write_table(work.unattributed_rows())
        names = {kind: final_name(path, kind) for kind, path in made.items()}
        out_of_span = len(every_action.event_ids) - len(actions.event_ids)
        manifest = work.manifest(names, action_counts, out_of_span)
        commit(folder, {names[kind]: path for kind, path in made.items()}, manifest)
    return Joined(manifest, index.repeated, action_counts.repeated)


class _Work:
    """Everything that is known of a log when its dataset is written."""

    def __init__(
        self,
        wanted: Wanted,
        index: RequestIndex,
        groups: Sequence[Group],
        group: np.ndarray,
        in_span: np.ndarray,
        actions: Actions,
        attributed: Attributed,
        seen: SeenPins,
        scored: np.ndarray,
    ) -> None:
        self._wanted, self._index, self._actions, self._seen = wanted, index, actions, seen
        #: int64[R], how many pins of each request have scores; the dataset has no others.
        self._scored = scored
        self._requests: Requests = index.requests
        self._surfaces = sorted({found.surface for found in groups})
        on_surface = np.array(
            [wanted.surfaces is None or found.surface in wanted.surfaces for found in groups] + [False]
        )
        #: bool[R], which requests the dataset has.
        self._kept = in_span & (group >= 0) & on_surface[group]
        self._in_span = in_span
        # Groups are numbered by their content, because the order in which they appear depends on the log's files.
        used = sorted((tuple(groups[i].model_dump().values()), int(i)) for i in np.unique(group[self._kept]))
        self._groups = tuple(groups[i] for _, i in used)
        self._group_numbers = np.zeros(len(groups) + 1, np.uint32)
        self._group_numbers[[i for _, i in used]] = np.arange(len(used))
        self._attributed = _selected(attributed, actions, index, self._kept, scored)
        # Actions of the dataset, in the order of its requests; within one, they keep the order of time and event id.
        self._acted = np.flatnonzero(self._attributed.request >= 0)
        self._acted = self._acted[np.argsort(self._attributed.request[self._acted], kind="stable")]

    def check_anything_left(self) -> None:
        """Raise JoinError if the dataset would be empty."""
        if self._kept.any():
            return
        why = ", ".join(f"{count:,} are left out because of {reason}" for reason, count in self._left_out().items())
        wanted = ", ".join(self._wanted.surfaces or ())
        none = f"none is of surface {wanted} (the log has {', '.join(self._surfaces)}); correct or omit --surface"
        raise JoinError(f"no request of the log is left to join: {why or none}")

    def dataset_rows(self, bucket: pa.Table) -> pa.Table:
        """Return the rows of a sorted bucket that the dataset has, as `REQUESTS`."""
        numbers = self._requests.numbers(bucket["request_id"].to_numpy())
        kept = self._kept[numbers]
        bucket, numbers = bucket.filter(pa.array(kept)), numbers[kept]
        splits = np.concatenate([[0], np.cumsum(self._shown[numbers])])
        columns = {
            **{name: bucket[name] for name in bucket.column_names},
            "group": pa.array(self._group_numbers[bucket["group"].to_numpy()]),
            "seen": pa.ListArray.from_arrays(pa.array(splits, pa.int32()), pa.array(self._seen.of(numbers))),
            "seen_reported": pa.array(self._seen.reported[numbers]),
            "outcomes": self._outcomes(numbers),
        }
        shown = pa.table([columns[name] for name in REQUESTS.names], REQUESTS)
        return without_unscored(shown, self._scored[numbers])

    @property
    def _shown(self) -> np.ndarray:
        """int64[R], how many pins each request showed, with or without scores."""
        return np.diff(self._seen.splits)

    def _outcomes(self, numbers: np.ndarray) -> pa.Array:
        owners = self._attributed.request[self._acted]
        first, stop = np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right")
        counts = stop - first
        splits = np.concatenate([[0], np.cumsum(counts)])
        own = self._acted[np.repeat(first - splits[:-1], counts) + np.arange(splits[-1])]
        actions, field = self._actions, REQUESTS.field("outcomes")
        values = {
            "position": pa.array(self._attributed.position[own], pa.uint32()),
            "action": _names(actions.names, actions.action[own]),
            "surface": _names(actions.surfaces, actions.surface[own]),
            "event_id": pa.array(actions.event_ids[own], pa.uint64()),
            "time_ms": pa.array(actions.time_ms[own], pa.int64()),
            "received_ms": pa.array(actions.received_ms[own], pa.int64()),
        }
        structs = pa.StructArray.from_arrays(
            [values[part.name] for part in field.type.value_type], fields=list(field.type.value_type)
        )
        return pa.ListArray.from_arrays(pa.array(splits, pa.int32()), structs, type=field.type)

    def unattributed_rows(self) -> pa.Table:
        """Return the actions that belong to no request of the dataset, as `UNATTRIBUTED`."""
        own = np.flatnonzero(self._attributed.reason)
        actions = self._actions
        request_ids, positions = actions.request_ids[own], actions.positions[own]
        columns = {
            "event_id": pa.array(actions.event_ids[own], pa.uint64()),
            "user_id": pa.array(actions.user_ids[own], pa.uint64()),
            "pin_id": pa.array(actions.pin_ids[own], pa.uint64()),
            "action": _names(actions.names, actions.action[own]),
            "surface": _names(actions.surfaces, actions.surface[own]),
            "time_ms": pa.array(actions.time_ms[own], pa.int64()),
            "received_ms": pa.array(actions.received_ms[own], pa.int64()),
            "request_id": pa.array(request_ids, pa.uint64(), mask=request_ids == 0),
            "position": pa.array(np.maximum(positions, 0), pa.uint32(), mask=positions < 0),
            "reason": _names(REASONS, self._attributed.reason[own]),
        }
        return pa.table([columns[name] for name in UNATTRIBUTED.names], UNATTRIBUTED)

    def manifest(self, names: dict[str, str], action_counts: ActionCounts, out_of_span: int) -> Manifest:
        times, wanted = self._requests.time_ms[self._kept], self._wanted
        return Manifest(
            fingerprint=fingerprint(REQUESTS),
            log_fingerprint=fingerprint(IMPRESSIONS),
            window_ms=wanted.window.after_ms,
            clock_skew_ms=wanted.window.skew_ms,
            since_ms=wanted.span.since_ms,
            until_ms=wanted.span.until_ms,
            surfaces=None if wanted.surfaces is None else tuple(sorted(wanted.surfaces)),
            first_ms=int(times[0]),
            last_ms=int(times[-1]),
            inputs_sha256=self._inputs_digest(names),
            counts=self._counts(action_counts, out_of_span),
            delays_ms=self._delays(),
            actions=self._actions.names,
            groups=self._groups,
            requests=names["requests"],
            unattributed=names["unattributed"],
        )

    def _counts(self, action_counts: ActionCounts, out_of_span: int) -> Counts:
        reasons = np.bincount(self._attributed.reason, minlength=len(REASONS))
        unscored = (self._shown - self._scored)[self._kept]
        return Counts(
            requests=int(self._kept.sum()),
            pins=int(self._scored[self._kept].sum()),
            cut_requests=int(np.count_nonzero(unscored)),
            cut_pins=int(unscored.sum()),
            left_out=self._left_out(),
            actions=len(self._actions.event_ids),
            changed_actions=action_counts.changed,
            attributed=int(reasons[0]),
            before_shown_within_skew=int((self._attributed.delay_ms < 0).sum()),
            unattributed={REASONS[code]: int(count) for code, count in enumerate(reasons) if code and count},
            jumped_clocks=int(self._attributed.jumped.sum()),
            actions_out_of_span=out_of_span,
            reported_requests=int((self._seen.reported & self._kept).sum()),
            seen_without_request=self._seen.unknown_requests,
            seen_beyond_answer=self._seen.beyond_answer,
            seen_of_other_users=self._seen.other_users,
        )

    def _left_out(self) -> dict[str, int]:
        codes = np.bincount(self._index.left_out[self._in_span], minlength=len(LEFT_OUT))
        return {LEFT_OUT[code]: int(count) for code, count in enumerate(codes) if code and count}

    def _delays(self) -> dict[str, dict[str, int]]:
        """Return quantiles of the delays, of which those within the clock skew count as 0."""
        delays = np.maximum(self._attributed.delay_ms[self._acted], 0)
        actions = self._actions.action[self._acted]
        by_action = {"": delays} | {name: delays[actions == code] for code, name in enumerate(self._actions.names)}
        return {
            name: {
                quantile: int(value)
                for quantile, value in zip(
                    _QUANTILES, np.quantile(found, list(_QUANTILES.values()), method="inverted_cdf"), strict=True
                )
            }
            for name, found in by_action.items()
            if len(found)
        }

    def _inputs_digest(self, names: dict[str, str]) -> str:
        """Digest what was joined. The names of the dataset's files cover the requests' columns and all actions."""
        digest = hashlib.sha256(repr(sorted(names.items())).encode())
        for array in (self._requests.request_ids, self._index.left_out, self._seen.reported, self._seen.seen):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _check_complete(found: np.ndarray) -> None:
    """Raise JoinError unless bool[R], the requests that the second reading found, are all."""
    lost = int(np.count_nonzero(~found))
    if lost:
        raise JoinError(
            f"the log has lost {lost:,} of its requests while it was joined (impressions.retention_days deletes them); "
            "join again, with --since after its oldest day"
        )


def _selected(
    attributed: Attributed, actions: Actions, index: RequestIndex, kept: np.ndarray, scored: np.ndarray
) -> Attributed:
    """Set apart the actions whose request is in the log, but not in the dataset, or only without their pin."""
    code, absent, unscored = map(REASONS.index, ("not_selected", "no_such_request", "pin_without_scores"))
    reason, request = attributed.reason.copy(), attributed.request.copy()
    reason[(reason == absent) & (positions_in(index.elsewhere, actions.request_ids) >= 0)] = code
    found = request >= 0
    lost = np.flatnonzero(found)[~kept[request[found]]]
    reason[lost], request[lost] = code, -1
    found = request >= 0
    cut = np.flatnonzero(found)[attributed.position[found] >= scored[request[found]]]
    reason[cut], request[cut] = unscored, -1
    position, delay_ms = (np.where(request >= 0, column, 0) for column in (attributed.position, attributed.delay_ms))
    return Attributed(request, position, reason, delay_ms, attributed.jumped)


def _names(vocabulary: Sequence[str], codes: np.ndarray) -> pa.Array:
    return pa.array(list(vocabulary), pa.string()).take(pa.array(codes, pa.int64()))
