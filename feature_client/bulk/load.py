"""Loading of whole feature groups from files: in chunks, resumable, and verified before the group is announced."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feature_client.bulk.source import CHUNK_ROWS, Source, SourceError
from feature_client.bulk.write import refuse_foreign
from feature_client.codec import Rows, RowState, decode_rows, encode_rows
from feature_client.groups import FINGERPRINT_BYTES, FeatureGroup
from feature_client.stores.store import Store

_SAMPLE = 1_000
_ANNOUNCED, _LOADING = b"pinrank:announced:", b"pinrank:loading:"


class VerificationError(Exception):
    """Rows that were read back differ from those that were loaded. The group was not announced."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """The record of a group version that was loaded and verified."""

    ref: str
    fingerprint: str
    rows: int
    source: str
    time_s: float


async def load(
    store: Store,
    group: FeatureGroup,
    source: Source,
    progress: Callable[[int], None],
    checking: Callable[[int], None] = lambda _done: None,
    *,
    replace: bool = False,
) -> Announcement:
    """Check a source's rows, write them, read a sample back, and announce the group.

    If any row of the source cannot be stored, nothing is written. An interrupted load resumes where it stopped if the
    source has the same content. Servers do not see the rows until a model reads this version of the group; other
    versions do not change.

    Args:
        store: a started store.
        group: the group of the rows. A new version is stored beside the old one.
        source: a source of the same group.
        progress: is called with the number of rows written so far.
        checking: is called with the number of rows checked so far.
        replace: whether rows of this version that have another description may be replaced.

    Raises:
        ForeignValuesError: there are such rows, and they may not. Nothing was written.
        SourceError: the source is not valid and nothing was written; or the file changed during the load, and the
            message says how many rows were written.
        VerificationError: rows that were read back differ. The group was not announced.
        StoreUnavailableError: the store failed. Call again to resume.
    """
    key = _LOADING + group.ref.encode()
    mark = f"{source.digest}:{group.fingerprint.hex()}:".encode()
    (found,) = await store.multi_get([key])
    done = _rows_done(found, mark, source.rows)
    source.check_unchanged()
    if not done:  # an interrupted load of this content has checked all rows
        source.check(checking)
        if not replace:
            first = next((ids for ids, _ in source.chunks(0)), np.empty(0, np.uint64))
            await refuse_foreign(store, group, first)
    progress(done)
    try:
        for ids, rows in source.chunks(done):
            await store.multi_put(zip(group.keys(ids), encode_rows(group, rows), strict=True))
            done += len(ids)
            await store.multi_put([(key, mark + str(done).encode())])
            progress(done)
        source.check_unchanged()
        await _verify(store, group, source)
    except (SourceError, VerificationError) as error:
        # The rows in the store are not reliable, so the next load writes all of them.
        await store.multi_put([(key, b"")])
        raise type(error)(
            f"{error}; {done} of {source.rows} rows were written, and the next load replaces them"
        ) from error
    announcement = Announcement(group.ref, group.fingerprint.hex(), source.rows, source.name, time.time())
    content = json.dumps({name: getattr(announcement, name) for name in Announcement.__slots__})
    await store.multi_put([(_ANNOUNCED + group.ref.encode(), content.encode()), (key, b"")])
    return announcement


def _rows_done(found: bytes | None, mark: bytes, rows: int) -> int:
    """Return how many rows an interrupted load of the same content wrote; 0 if there was none."""
    number = (found or b"").removeprefix(mark)
    if not (found or b"").startswith(mark) or not number.isdigit() or int(number) > rows:
        return 0
    return int(number)


async def _verify(store: Store, group: FeatureGroup, source: Source) -> None:
    """Compare a sample of every chunk with the rows in the store."""
    each = max(1, _SAMPLE * CHUNK_ROWS // max(1, source.rows))
    rng = np.random.default_rng(source.rows)
    for ids, rows in source.chunks(0):
        some = rng.permutation(len(ids))[:each]
        read: Rows = decode_rows(group, await store.multi_get(group.keys(ids[some])))
        wrong = np.flatnonzero((read.states != RowState.PRESENT) | (read.rows != rows[some]))
        if len(wrong):
            at = int(ids[some[wrong[0]]])
            raise VerificationError(
                f"group {group.ref}: {len(wrong)} of {len(some)} sampled rows differ from the file, such as that of "
                f"id {at}; stop any other process that writes this version, and load again"
            )


@dataclass(slots=True)
class GroupStat:
    """Statistics of the values that a store holds under one `name@version`.

    Attributes:
        values: the number of keys.
        sampled: how many of their values were read.
        sampled_bytes: the total size of the sampled values, without keys.
        fingerprints: the number of sampled values by fingerprint, in hex digits.
        announcement: the record of the bulk load, if there was one.
    """

    values: int
    sampled: int
    sampled_bytes: int
    fingerprints: dict[str, int]
    announcement: Announcement | None

    def sample(self, value: bytes | None) -> None:
        """Add one value to the sample; None means that it was deleted after the scan."""
        if value is not None:
            self.sampled += 1
            self.sampled_bytes += len(value)
            fingerprint = value[:FINGERPRINT_BYTES].hex()
            self.fingerprints[fingerprint] = self.fingerprints.get(fingerprint, 0) + 1


async def stat(store: Store, progress: Callable[[int], None]) -> dict[str, GroupStat]:
    """Return statistics of every group in a store. Reads every key and up to a thousand values of each group.

    Args:
        store: a started store.
        progress: is called with the number of keys seen so far.

    Returns:
        The statistics by `name@version`. Keys of other applications count under `other`.
    """
    found: dict[str, GroupStat] = {}
    announced: dict[str, Announcement] = {}
    seen = 0
    async for keys in store.scan():
        marks = [key for key in keys if key.startswith(_ANNOUNCED)]
        for content in await store.multi_get(marks):
            if (announcement := _read_announcement(content)) is not None:
                announced[announcement.ref] = announcement
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


def _read_announcement(content: bytes | None) -> Announcement | None:
    """Return an announcement, or None if the content is not a valid one; the group then counts as not loaded."""
    try:
        announcement = Announcement(**json.loads(content or b""))
        return announcement if isinstance(announcement.ref, str) and isinstance(announcement.rows, int) else None
    except (ValueError, TypeError):
        return None


def _ref_of(key: bytes) -> str:
    """Return the `name@version` of a key that `FeatureGroup.keys` built, or `other` for any other key."""
    prefix, colon, number = key.partition(b":")
    name, at, version = prefix.partition(b"@")
    ours = colon and at and len(number) == 8 and version.isdigit() and name.replace(b"_", b"").isalnum()
    return prefix.decode() if ours else "other"
