"""A log's requests in order of time, on disk: the log may be larger than memory, and its files in any order.

One pass distributes the rows over buckets, each of which holds a known range of requests; a bucket is then sorted in
memory. This is a distribution sort whose bounds come from the index of requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from impressions.dataset import GROUP_FIELDS, REQUESTS, Group, JoinError, flat, row_splits
from impressions.joining.records import checked
from impressions.joining.request_index import CONTRADICTION, NOT_FINITE, RequestIndex

#: Requests of a bucket; of 128 pins each, they take about 100 MB of memory.
REQUESTS_PER_BUCKET = 4096

_COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4")

#: The columns of a bucket: those of the dataset that come from the log.
_COLUMNS = [field for field in REQUESTS if field.name not in ("seen", "seen_reported", "outcomes")]


class Buckets:
    """The requests of a log, sorted.

    Args:
        folder: an empty folder for temporary files.
        index: the requests; `left_out` is updated as more reasons are found.
    """

    def __init__(self, folder: Path, index: RequestIndex) -> None:
        self._folder, self._index = folder, index
        count = len(index.requests.request_ids)
        self._groups: dict[Group, int] = {}
        self.count = math.ceil(count / REQUESTS_PER_BUCKET)
        #: int64[R], how many pins each request showed.
        self.pin_counts = np.zeros(count, np.int64)

    @property
    def groups(self) -> list[Group]:
        """What requests have in common, by the number in their column `group`, in order of appearance."""
        return list(self._groups)

    def fill(self, tables: Iterable[pa.Table]) -> Iterator[int]:
        """Distribute the rows of a log; yield how many rows of these requests have been read after each table.

        Raises:
            JoinError: a row contradicts itself, or has a propensity that cannot be.
        """
        done = 0
        for table in checked(tables, "impressions"):
            for start in range(0, table.num_rows, REQUESTS_PER_BUCKET):
                done += self._distribute(table.slice(start, REQUESTS_PER_BUCKET))
            yield done

    def _distribute(self, table: pa.Table) -> int:
        numbers = self._index.requests.numbers(table["request_id"].to_numpy())
        kept = np.flatnonzero(numbers >= 0)
        kept = kept[np.argsort(numbers[kept], kind="stable")]
        rows, numbers = self._checked_rows(table.take(kept), numbers[kept])
        bounds = np.searchsorted(numbers, np.arange(self.count + 1) * REQUESTS_PER_BUCKET)
        for bucket in np.flatnonzero(np.diff(bounds)).tolist():
            self._append(bucket, rows.slice(bounds[bucket], bounds[bucket + 1] - bounds[bucket]))
        return len(kept)

    def sort(self, bucket: int) -> pa.Table:
        """Bring a bucket into order, without repetitions and requests that are left out; return it, as `REQUESTS`.

        A request whose rows differ is left out from here on.
        """
        index = self._index
        table = self._read(bucket)
        numbers = index.requests.numbers(table["request_id"].to_numpy())
        order = np.argsort(numbers, kind="stable")
        table, numbers = table.take(order).combine_chunks(), numbers[order]
        repeats = np.flatnonzero(numbers[1:] == numbers[:-1])
        one, other = table.take(repeats), table.take(repeats + 1)
        if not one.equals(other):
            differing = [not one.slice(i, 1).equals(other.slice(i, 1)) for i in range(len(repeats))]
            found = numbers[repeats[differing]]
            index.left_out[found] = np.maximum(index.left_out[found], CONTRADICTION)
        first = np.ones(len(numbers), bool)
        first[1:] = numbers[1:] != numbers[:-1]
        kept = first & (index.left_out[numbers] == 0)
        # A log whose files are in order, without repetitions, is written once.
        if not kept.all() or (order[1:] < order[:-1]).any():
            table = table.filter(pa.array(kept)).combine_chunks()
            self._path(bucket).unlink()
            self._append(bucket, table)
        return table

    def take(self, bucket: int) -> pa.Table:
        """Return a bucket after `sort`, and remove its file."""
        table = self._read(bucket)
        self._path(bucket).unlink(missing_ok=True)
        return table

    def numbers(self, table: pa.Table) -> np.ndarray:
        """Return int64[r], the numbers of a bucket's requests."""
        return self._index.requests.numbers(table["request_id"].to_numpy())

    def _path(self, bucket: int) -> Path:
        return self._folder / f"bucket-{bucket:06}.arrow"

    def _append(self, bucket: int, rows: pa.Table) -> None:
        """Add a whole stream to a bucket's file, which is closed in between: there may be thousands of buckets."""
        with (
            pa.OSFile(str(self._path(bucket)), "ab") as file,
            pa.ipc.new_stream(file, rows.schema, options=_COMPRESSED) as writer,
        ):
            writer.write_table(rows)

    def _read(self, bucket: int) -> pa.Table:
        path, parts = self._path(bucket), []
        if path.exists():  # a bucket whose requests are all left out has no file
            with pa.OSFile(str(path)) as file:
                while file.tell() < file.size():
                    parts.append(pa.ipc.open_stream(file).read_all())
        return pa.concat_tables(parts) if parts else pa.schema(_COLUMNS).empty_table()

    def _checked_rows(self, table: pa.Table, numbers: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """Return the rows that can be used, with the columns of a bucket, and their numbers."""
        table = table.combine_chunks()
        ids = table["request_id"].to_numpy()
        splits = row_splits(table["pin_ids"])
        pins = np.diff(splits)
        sizes = {name: np.diff(row_splits(table[name])) for name in ("heads", "parties", "attributes")}
        for name, expected in {
            "places": pins,
            "utilities": pins,
            "propensities": pins,
            "probabilities": pins * sizes["heads"],
            "party_utilities": pins * sizes["parties"],
            "attribute_values": pins * sizes["attributes"],
            "party_weights": sizes["parties"],
        }.items():
            _refuse(
                np.diff(row_splits(table[name])) != expected,
                ids,
                f"has {name} of a length that does not fit its pins; remove or repair its file",
            )
        _check_places(table, ids, splits)
        _check_propensities(table, ids, splits)
        finite = np.ones(len(ids), bool)
        for name in ("probabilities", "party_utilities", "utilities"):
            finite &= _all_per_list(np.isfinite(flat(table[name])), row_splits(table[name]))
        self._index.left_out[numbers[~finite]] = NOT_FINITE
        self.pin_counts[numbers] = pins
        usable = self._index.left_out[numbers] == 0
        plain = table.filter(pa.array(usable))
        columns = [self._group_numbers(plain), *(_plain_column(plain, field) for field in _COLUMNS[1:])]
        return pa.table(columns, pa.schema(_COLUMNS)), numbers[usable]

    def _group_numbers(self, table: pa.Table) -> pa.Array:
        """Return uint32[r], the number of what each request has in common with others."""
        keys = [_joined(table[name]) for name in GROUP_FIELDS]
        codes = np.stack([key.dictionary_encode().indices.to_numpy() for key in keys], axis=1)
        _, first, inverse = np.unique(codes, axis=0, return_index=True, return_inverse=True)
        known = []
        for row in first:
            group = Group.model_validate({name: table[name][int(row)].as_py() for name in GROUP_FIELDS})
            known.append(self._groups.setdefault(group, len(self._groups)))
        return pa.array(np.array(known, np.uint32)[inverse.reshape(-1)] if known else [], pa.uint32())


def _plain_column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    column = table[field.name]
    return column if column.type == field.type else column.cast(field.type)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Return one string per row; names have no control characters."""
    found = column.combine_chunks()
    if pa.types.is_list(found.type):
        found = pc.binary_join(found.cast(pa.list_(pa.string())), "\x1f")
    return found.cast(pa.string())


def _check_places(table: pa.Table, ids: np.ndarray, splits: np.ndarray) -> None:
    places, requests = flat(table["places"]), np.repeat(np.arange(len(ids)), np.diff(splits))
    order = np.lexsort((places, requests))
    again = (np.diff(places[order].astype(np.int64)) == 0) & (np.diff(requests[order]) == 0)
    wrong = places >= table["candidates"].to_numpy()[requests]
    wrong[order[1:][again]] = True
    what = "has places that repeat or that its request does not have; remove or repair its file"
    _refuse(~_all_per_list(~wrong, splits), ids, what)


def _check_propensities(table: pa.Table, ids: np.ndarray, splits: np.ndarray) -> None:
    wrong = "must be above 0 and at most 1; a log with others cannot be weighed: remove or repair its file"
    whole = table["order_propensity"].to_numpy()
    _refuse(~((whole > 0) & (whole <= 1)), ids, f"has an order_propensity that {wrong}")
    each = flat(table["propensities"])
    _refuse(~_all_per_list((each > 0) & (each <= 1), splits), ids, f"has a value in propensities that {wrong}")
    weights = np.isfinite(flat(table["party_weights"]))
    finite = _all_per_list(weights, row_splits(table["party_weights"]))
    _refuse(~finite, ids, "has a party weight that is not finite; remove or repair its file")


def _refuse(wrong: np.ndarray, ids: np.ndarray, what: str) -> None:
    if wrong.any():
        others = int(np.count_nonzero(wrong)) - 1
        also = f" (so do {others} others of this file)" if others else ""
        raise JoinError(f"request {int(ids[wrong][0])} of the log {what}{also}")


def _all_per_list(values: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Return bool[r], whether all values of each of r lists are true; an empty list's are."""
    return np.asarray(np.diff(np.concatenate([[0], np.cumsum(~values)])[splits]) == 0)
