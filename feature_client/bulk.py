"""Whole feature groups from files into a store: in chunks, resumable, verified before they are announced."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feature_client.codec import Rows, State, decode_rows, encode_rows
from feature_client.groups import FINGERPRINT_BYTES, Embedding, FeatureGroup
from feature_client.store import Store

CHUNK_ROWS = 20_000
_SAMPLE = 1_000
_ANNOUNCED, _LOADING = b"pinrank:announced:", b"pinrank:loading:"

#: uint64[N] ids and structured[N] rows.
Chunk = tuple[np.ndarray, np.ndarray]


class SourceError(Exception):
    """A file does not hold what the group's description says; the message names the column and the fix."""


class VerificationError(Exception):
    """What was read back is not what was loaded; the group was not announced."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """That a group version was loaded and verified."""

    ref: str
    fingerprint: str
    rows: int
    source: str
    time_s: float


class Source:
    """Rows of a group in a file: `.parquet`, or `.npz` with an array per field; ids in the column `id`."""

    def __init__(self, path: Path, group: FeatureGroup) -> None:
        """Open a file. Raises SourceError when it cannot be this group's."""
        self._path, self._group = path, group
        self.name = f"{path.name}:{path.stat().st_size}" if path.exists() else path.name
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet as pq  # noqa: PLC0415 - serving does not need it

                self._parquet = pq.ParquetFile(path)
                self.rows = int(self._parquet.metadata.num_rows)
                columns = set(self._parquet.schema_arrow.names)
            elif path.suffix == ".npz":
                self._parquet = None
                with np.load(path, allow_pickle=False) as archive:
                    self._arrays = {name: archive[name] for name in archive.files}
                columns = set(self._arrays)
                self.rows = len(self._arrays.get("id", ()))
            else:
                raise SourceError(f"{path}: a source is a .parquet or an .npz file")
        except ImportError as error:
            raise SourceError("reading Parquet needs pyarrow: pip install 'pinrank[data]'") from error
        except (OSError, ValueError) as error:
            raise SourceError(f"{path}: {error}") from error
        lacking = [name for name in ("id", *(field.name for field in group.fields)) if name not in columns]
        if lacking:
            raise SourceError(
                f"{path}: no column {', '.join(lacking)}; group {group.ref} needs id and one column a field"
            )

    def chunks(self, start: int) -> Iterator[Chunk]:
        """Yield rows from position `start` on, in the file's order."""
        for chunk in self._parquet_columns(start) if self._parquet else self._npz_columns(start):
            yield self._structured(chunk)

    def _npz_columns(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        for first in range(start, self.rows, CHUNK_ROWS):
            yield {name: array[first : first + CHUNK_ROWS] for name, array in self._arrays.items()}

    def _parquet_columns(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        assert self._parquet is not None, "called for Parquet files"  # noqa: S101
        names = ["id", *(field.name for field in self._group.fields)]
        position = 0
        for batch in self._parquet.iter_batches(batch_size=CHUNK_ROWS, columns=names):
            first = max(0, start - position)
            position += len(batch)
            if first < len(batch):
                yield {name: _column(batch.column(name)[first:]) for name in names}

    def _structured(self, columns: dict[str, np.ndarray]) -> Chunk:
        ids = columns["id"]
        if ids.dtype.kind not in "ui" or (ids.dtype.kind == "i" and len(ids) and ids.min() < 0):
            raise SourceError(f"{self._path}: column id must hold whole numbers from 0 to 2^64 - 1, not {ids.dtype}")
        rows = np.zeros(len(ids), self._group.dtype)
        for field in self._group.fields:
            wanted = (len(ids), field.space.dim) if isinstance(field, Embedding) else (len(ids),)
            found = columns[field.name]
            if found.shape != wanted:
                raise SourceError(
                    f"{self._path}: column {field.name} has shape {found.shape}, group {self._group.ref} needs {wanted}"
                )
            rows[field.name] = found
            if found.dtype.kind in "iu" and not np.array_equal(rows[field.name], found):
                wanted_type = rows[field.name].dtype
                raise SourceError(f"{self._path}: column {field.name} holds {found.dtype} that {wanted_type} cannot")
        return ids.astype(np.uint64), rows


def _column(column: object) -> np.ndarray:
    """Return an Arrow column as NumPy; lists of one length become [N, D]."""
    import pyarrow as pa  # noqa: PLC0415

    if isinstance(column, (pa.FixedSizeListArray, pa.ListArray, pa.LargeListArray)):
        flat = np.asarray(column.flatten())
        return flat.reshape(len(column), -1) if len(column) and len(flat) % len(column) == 0 else flat
    return np.asarray(column)


async def load(store: Store, group: FeatureGroup, source: Source, progress: Callable[[int], None]) -> Announcement:
    """Write a source's rows, read a sample back, and announce the group.

    A load that was interrupted goes on where it was, when the source is the same file. Servers do not see the rows
    before a model reads this version of the group: other versions stay as they are.

    Args:
        store: a started store.
        group: whose rows; a new version stands beside the old.
        source: of the same group.
        progress: called with the rows done so far.

    Raises:
        SourceError, VerificationError: the announcement was not made.
        StoreUnavailableError: call again to go on.
    """
    key = _LOADING + group.ref.encode()
    mark = f"{source.name}:{group.fingerprint.hex()}:"
    (found,) = await store.multi_get([key])
    before = (found or b"").decode()
    done = int(before.removeprefix(mark)) if before.startswith(mark) else 0
    progress(done)
    for ids, rows in source.chunks(done):
        try:
            values = encode_rows(group, rows)
        except ValueError as error:
            raise SourceError(f"rows {done} to {done + len(ids)}: {error}") from error
        await store.multi_put(zip(group.keys(ids), values, strict=True))
        done += len(ids)
        await store.multi_put([(key, f"{mark}{done}".encode())])
        progress(done)
    await _verify(store, group, source)
    announcement = Announcement(group.ref, group.fingerprint.hex(), source.rows, source.name, time.time())
    content = json.dumps({name: getattr(announcement, name) for name in Announcement.__slots__})
    await store.multi_put([(_ANNOUNCED + group.ref.encode(), content.encode()), (key, b"")])
    return announcement


async def _verify(store: Store, group: FeatureGroup, source: Source) -> None:
    """Compare a sample of every chunk with what the store gives back."""
    each = max(1, _SAMPLE * CHUNK_ROWS // max(1, source.rows))
    rng = np.random.default_rng(source.rows)
    for ids, rows in source.chunks(0):
        # Of an id that repeats, the last row counts.
        _, last = np.unique(ids[::-1], return_index=True)
        some = rng.permutation(len(ids) - 1 - last)[:each]
        read: Rows = decode_rows(group, await store.multi_get(group.keys(ids[some])))
        wrong = np.flatnonzero((read.states != State.PRESENT) | (read.rows != rows[some]))
        if len(wrong):
            at = int(ids[some[wrong[0]]])
            raise VerificationError(
                f"group {group.ref}: {len(wrong)} of {len(some)} sampled rows came back otherwise, id {at} among them; "
                "was something else writing this version? Load again"
            )


@dataclass(slots=True)
class GroupStat:
    """What a store holds under one `name@version`.

    Attributes:
        values: how many keys.
        sampled: how many of them were read.
        sampled_bytes: their sizes together, without keys.
        fingerprints: of the sampled values, by hex digits.
        announcement: if the group was loaded in bulk.
    """

    values: int
    sampled: int
    sampled_bytes: int
    fingerprints: dict[str, int]
    announcement: Announcement | None

    def sample(self, value: bytes | None) -> None:
        """Note one of its values; None: deleted meanwhile."""
        if value is not None:
            self.sampled += 1
            self.sampled_bytes += len(value)
            fingerprint = value[:FINGERPRINT_BYTES].hex()
            self.fingerprints[fingerprint] = self.fingerprints.get(fingerprint, 0) + 1


async def stat(store: Store, progress: Callable[[int], None]) -> dict[str, GroupStat]:
    """Count a store's groups; reads every key and up to a thousand values of each group.

    Args:
        store: a started store.
        progress: called with the keys seen so far.

    Returns:
        By `name@version`; keys that are none of ours under `other`.
    """
    found: dict[str, GroupStat] = {}
    announced: dict[str, Announcement] = {}
    seen = 0
    async for keys in store.scan():
        marks = [key for key in keys if key.startswith(_ANNOUNCED)]
        for key, content in zip(marks, await store.multi_get(marks), strict=True):
            announced[key[len(_ANNOUNCED) :].decode()] = Announcement(**json.loads(content or b"{}"))
        wanted: list[tuple[GroupStat, bytes]] = []
        for key in keys:
            if key.startswith((_ANNOUNCED, _LOADING)):
                continue
            own = found.setdefault(ref := _ref_of(key), GroupStat(0, 0, 0, {}, None))
            own.values += 1
            if own.values <= _SAMPLE and ref != "other":
                wanted.append((own, key))
        values = await store.multi_get([key for _, key in wanted])
        for (own, _), value in zip(wanted, values, strict=True):
            own.sample(value)
        seen += len(keys)
        progress(seen)
    for ref, announcement in announced.items():
        if ref in found:
            found[ref].announcement = announcement
    return found


def _ref_of(key: bytes) -> str:
    """Return `name@version` of a key of `FeatureGroup.keys`, else `other`."""
    prefix, colon, number = key.partition(b":")
    name, at, version = prefix.partition(b"@")
    ours = colon and at and len(number) == 8 and version.isdigit() and name.replace(b"_", b"").isalnum()
    return prefix.decode() if ours else "other"
