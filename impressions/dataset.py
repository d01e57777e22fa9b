"""A joined dataset: a folder with answered requests, what became of each pin, and the actions that fit no request.

`manifest.json` is the point of commit. It names the other files by their content, so a reader finds either the old
dataset or the new one, whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from impressions.errors import LogError
from impressions.row_groups import outside
from impressions.schema import ACTIONS, FINGERPRINT_KEY, IMPRESSIONS, TABLES, fingerprint
from impressions.slates import Slates

MANIFEST = "manifest.json"

#: What all requests of a group have in common; the manifest lists it once.
GROUP_FIELDS = ("surface", "model", "model_digest", "utility_digest", "heads", "parties", "attributes")


def _plain(field: pa.Field) -> pa.Field:
    """Return a field with its names as strings: a dictionary's order would depend on the order of the log's files."""
    return field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field


#: One row per answered request, by time and then request id: the log's columns, and what became of the K pins.
REQUESTS = pa.schema(
    [
        pa.field("group", pa.uint32(), nullable=False),  # position in the manifest's list
        *(_plain(field) for field in IMPRESSIONS if field.name not in GROUP_FIELDS),
        pa.field("seen", pa.list_(pa.bool_()), nullable=False),  # [K]; all true without a report
        pa.field("seen_reported", pa.bool_(), nullable=False),
        pa.field(
            "outcomes",  # the actions attributed to the request, by time and then event id
            pa.list_(
                pa.struct(
                    [
                        pa.field("position", pa.uint32(), nullable=False),  # of the pin in the answer, from 0
                        pa.field("action", pa.string(), nullable=False),
                        pa.field("surface", pa.string(), nullable=False),
                        pa.field("event_id", pa.uint64(), nullable=False),
                        pa.field("time_ms", pa.int64(), nullable=False),
                        pa.field("received_ms", pa.int64(), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
    ]
)

#: One row per action that belongs to no request of the dataset, and why; by time, then user, then event id.
UNATTRIBUTED = pa.schema([*(_plain(field) for field in ACTIONS), pa.field("reason", pa.string(), nullable=False)])


class JoinError(LogError):
    """A log cannot be joined, or a folder is not a joined dataset; the message names the fix."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Group(_Part):
    """What a set of requests has in common."""

    surface: str
    model: str
    model_digest: str
    utility_digest: str
    heads: tuple[str, ...]
    parties: tuple[str, ...]
    attributes: tuple[str, ...]


class Counts(_Part):
    """What became of each distinct row of the log; nothing here depends on how often a row is repeated.

    Attributes:
        requests: requests of the dataset.
        pins: pins that they showed and that have scores.
        cut_requests: of these requests, those that showed more pins behind: under overload, pins go without scores.
        cut_pins: how many pins those are; the dataset does not have them.
        left_out: requests that the dataset lacks, by reason.
        actions: actions within the span.
        changed_actions: actions that were sent again with another content; the one received first counts.
        attributed: actions that belong to a request of the dataset.
        before_shown_within_skew: of them, those that happened before their request, by at most the clock skew.
        unattributed: actions that do not, by reason.
        jumped_clocks: of them, those whose own time misses the window and whose time of receipt is within it.
        actions_out_of_span: actions that are too early or too late for the wanted span; no file has them.
        reported_requests: requests of the dataset with a report of what the user looked at.
        seen_without_request: requests that such a report names and the log lacks.
        seen_beyond_answer: reported positions that the answers did not have.
        seen_of_other_users: requests and users of reports whose user is not the request's; such reports do not count.
    """

    requests: int
    pins: int
    cut_requests: int = 0
    cut_pins: int = 0
    left_out: dict[str, int]
    actions: int
    changed_actions: int
    attributed: int
    before_shown_within_skew: int
    unattributed: dict[str, int]
    jumped_clocks: int
    actions_out_of_span: int
    reported_requests: int
    seen_without_request: int
    seen_beyond_answer: int
    seen_of_other_users: int = 0


class Manifest(_Part):
    """The content of `manifest.json`.

    Attributes:
        fingerprint: of `REQUESTS`, with which the files were written.
        log_fingerprint: of the log's table of impressions.
        window_ms: the longest delay of an action after its request.
        clock_skew_ms: how long before its request an action may seem to have happened.
        since_ms, until_ms: the wanted span, `until_ms` excluded; None without a limit.
        surfaces: the wanted surfaces; None for all.
        first_ms, last_ms: when the first and the last request of the dataset were answered.
        inputs_sha256: of the rows that were joined, whatever their order, files and repetitions were.
        counts: how many rows there are of each kind.
        delays_ms: quantiles of the delays of attributed actions, by action; under "" those of all.
        actions: the names of all actions of the log, sorted.
        groups: what requests have in common, by the number that rows name.
        requests, unattributed: the names of the two files; each holds a part of its content's SHA-256.
    """

    fingerprint: str
    log_fingerprint: str
    window_ms: int
    clock_skew_ms: int
    since_ms: int | None
    until_ms: int | None
    surfaces: tuple[str, ...] | None
    first_ms: int
    last_ms: int
    inputs_sha256: str
    counts: Counts
    delays_ms: dict[str, dict[str, int]]
    actions: tuple[str, ...]
    groups: tuple[Group, ...]
    requests: str
    unattributed: str

    def encoded(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read what a joined dataset holds.

    Raises:
        JoinError: the folder is not a joined dataset, or one of another version.
    """
    again = f"write it with `pinrank impressions join LOG --window 30m --out {folder}`"
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if any((folder / table).is_dir() for table in TABLES):
            raise JoinError(
                f"{folder} is an impression log and not a joined dataset; join it with `pinrank impressions join "
                f"{folder} --window 30m --out joined`, and name the folder joined instead"
            ) from error
        raise JoinError(f"{folder} is not a joined dataset, because it has no {MANIFEST}; {again}") from error
    try:
        found = json.loads(content)
        if isinstance(found, dict) and found.get("fingerprint") != fingerprint(REQUESTS):
            raise JoinError(
                f"{folder} was joined by another version of pinrank: its fingerprint is {found.get('fingerprint')!r}, "
                f"and this version reads {fingerprint(REQUESTS)!r}; {again}"
            )
        return Manifest.model_validate(found)
    except (ValueError, ValidationError) as error:
        raise JoinError(f"{folder / MANIFEST} is damaged: {error}; {again}") from error


def read_requests(
    folder: Path,
    columns: Sequence[str] | None = None,
    *,
    since_ms: int | None = None,
    until_ms: int | None = None,
    groups: Sequence[int] | None = None,
) -> Iterator[pa.Table]:
    """Yield the requests of a joined dataset in order of time, then request id, some thousands at a time.

    Args:
        folder: a joined dataset.
        columns: fields of `REQUESTS` to read; None reads all.
        since_ms: the earliest time of a request, Unix time in milliseconds; None reads from the first.
        until_ms: the time before which requests were answered; None reads to the last.
        groups: numbers of the groups to read; None reads all.

    Raises:
        JoinError: the folder is not a joined dataset, or its file is missing or damaged.
    """
    path = folder / read_manifest(folder).requests
    names = REQUESTS.names if columns is None else list(columns)
    try:
        with pq.ParquetFile(path) as file:
            _check_fingerprint(file.schema_arrow, path)
            for number in range(file.num_row_groups):
                if outside(file.metadata.row_group(number), since_ms, until_ms):
                    continue
                found = file.read_row_group(number, columns=sorted({*names, "time_ms", "group"}))
                kept = _selected(found, since_ms, until_ms, groups)
                if kept.num_rows:
                    yield kept.select(names)
    except (pa.ArrowException, OSError) as error:
        raise JoinError(f"{path} is damaged or missing: {error}; run `pinrank impressions join` again") from error


def read_unattributed(folder: Path) -> pa.Table:
    """Return the actions that belong to no request of the dataset, as `UNATTRIBUTED`.

    Raises:
        JoinError: the folder is not a joined dataset, or its file is missing or damaged.
    """
    path = folder / read_manifest(folder).unattributed
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise JoinError(f"{path} is damaged or missing: {error}; run `pinrank impressions join` again") from error


def read_slates(
    folder: Path,
    surface: str | None = None,
    model: str | None = None,
    *,
    since_ms: int | None = None,
    until_ms: int | None = None,
) -> list[Slates]:
    """Read a joined dataset as arrays.

    Args:
        folder: what `pinrank impressions join --out` wrote.
        surface: the surface to read; None reads all.
        model: "name@version" of the model whose answers to read; None reads all.
        since_ms: the earliest time of a request, Unix time in milliseconds; None reads from the first.
        until_ms: the time before which requests were answered; None reads to the last.

    Returns:
        One item per surface, model and utility digest (and equal heads, parties and attributes), sorted by these. The
        requests of each are in order of time, then request id. The actions of each are its heads, in their order, then
        the other actions of the dataset, sorted. Empty if the time span has no request.

    Raises:
        JoinError: the folder is not a joined dataset, or it has no request of that surface and model.

    Cost: holds all arrays in memory, about 100 bytes a pin.
    """
    manifest = read_manifest(folder)
    wanted = [
        number
        for number, group in enumerate(manifest.groups)
        if surface in (None, group.surface) and model in (None, group.model)
    ]
    if not wanted:
        known = ", ".join(sorted({f"{group.surface} of {group.model}" for group in manifest.groups}))
        raise JoinError(
            f"{folder} has no request of surface {surface or '(any)'} and model {model or '(any)'}; it has {known}"
        )
    parts: dict[int, list[pa.Table]] = {number: [] for number in wanted}
    for table in read_requests(folder, _SLATE_COLUMNS, since_ms=since_ms, until_ms=until_ms, groups=wanted):
        for number in pc.unique(table["group"]).to_pylist():
            parts[number].append(table.filter(pc.equal(table["group"], number)))
    return [
        _slates(manifest.groups[number], manifest.actions, pa.concat_tables(tables))
        for number, tables in parts.items()
        if tables
    ]


_SLATE_COLUMNS = (
    *("group", "request_id", "user_id", "time_ms", "arm", "party_weights", "order_propensity", "candidates", "pin_ids"),
    *("places", "probabilities", "party_utilities", "attribute_values", "utilities", "propensities", "seen"),
    "outcomes",
)


def _slates(group: Group, known_actions: Sequence[str], table: pa.Table) -> Slates:
    actions = (*group.heads, *(name for name in known_actions if name not in group.heads))
    splits = row_splits(table["pin_ids"])
    rows = int(splits[-1])
    return Slates(
        surface=group.surface,
        model=group.model,
        utility_digest=group.utility_digest,
        heads=group.heads,
        parties=group.parties,
        attributes=group.attributes,
        actions=actions,
        request_ids=table["request_id"].to_numpy(),
        user_ids=table["user_id"].to_numpy(),
        time_ms=table["time_ms"].to_numpy(),
        arms=np.array(table["arm"].fill_null("").to_pylist(), np.str_),
        party_weights=flat(table["party_weights"]).reshape(table.num_rows, len(group.parties)),
        order_propensities=table["order_propensity"].to_numpy(),
        candidates=table["candidates"].to_numpy().astype(np.int64),
        row_splits=splits,
        pin_ids=flat(table["pin_ids"]),
        places=flat(table["places"]),
        probabilities=flat(table["probabilities"]).reshape(rows, len(group.heads)),
        party_utilities=flat(table["party_utilities"]).reshape(rows, len(group.parties)),
        attribute_values=flat(table["attribute_values"]).reshape(rows, len(group.attributes)),
        utilities=flat(table["utilities"]),
        propensities=flat(table["propensities"]),
        labels=labels_of(table["outcomes"], splits, actions),
        seen=flat(table["seen"]),
    )


def labels_of(outcomes: pa.ChunkedArray, splits: np.ndarray, actions: Sequence[str]) -> np.ndarray:
    """Return bool[N, B], which of B actions each shown pin received; actions beyond them are ignored.

    Args:
        outcomes: the column of R requests.
        splits: int64[R + 1], where the pins of each request begin.
        actions: the names of the columns.
    """
    labels = np.zeros((int(splits[-1]), len(actions)), bool)
    values = pa.chunked_array([chunk.flatten() for chunk in outcomes.chunks], outcomes.type.value_type)
    if not len(values):
        return labels
    acted = np.repeat(splits[:-1], np.diff(row_splits(outcomes)))
    rows = acted + pc.struct_field(values, "position").to_numpy()
    columns = pc.index_in(pc.struct_field(values, "action"), pa.array(actions, pa.string()))
    known = columns.is_valid().to_numpy()
    labels[rows[known], columns.drop_null().to_numpy()] = True
    return labels


def row_splits(column: pa.ChunkedArray) -> np.ndarray:
    """Return int64[R + 1], where the values of each of R lists begin in the flat column."""
    counts = pc.list_value_length(column).to_numpy()
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """Return the values of all lists of a column as one array."""
    if not column.num_chunks:
        return np.asarray(pa.array([], column.type.value_type).to_numpy(zero_copy_only=False))
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_fingerprint(schema: pa.Schema, path: Path) -> None:
    found = (schema.metadata or {}).get(FINGERPRINT_KEY, b"none").decode()
    if found != fingerprint(REQUESTS):
        raise JoinError(
            f"{path} has fingerprint {found}, expected {fingerprint(REQUESTS)}; run `pinrank impressions join` again"
        )


def _selected(table: pa.Table, since_ms: int | None, until_ms: int | None, groups: Sequence[int] | None) -> pa.Table:
    if since_ms is not None:
        table = table.filter(pc.greater_equal(table["time_ms"], since_ms))
    if until_ms is not None:
        table = table.filter(pc.less(table["time_ms"], until_ms))
    if groups is not None:
        table = table.filter(pc.is_in(table["group"], pa.array(groups, pa.uint32())))
    return table
