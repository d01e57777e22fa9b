"""A joined dataset as it is written: under temporary names, until the manifest names it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from impressions.dataset import MANIFEST, JoinError, Manifest
from impressions.schema import FINGERPRINT_KEY, fingerprint

#: Temporary files of a join; what a killed join left is removed by the next.
_TEMPORARY = ".joining"
_OURS = re.compile(r"(requests|unattributed)-[0-9a-f]{16}\.parquet")


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Lock a dataset's folder, which is made if there is none; yield an empty folder in it for temporary files.

    Raises:
        JoinError: the folder holds something else, another join is writing it, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise JoinError(f"{folder} is a file; give --out a new folder, or that of an earlier join") from error
    except OSError as error:
        raise JoinError(f"{folder} cannot be created: {error.strerror}; give --out another folder") from error
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in (MANIFEST, _TEMPORARY) and not _is_ours(p))
    if foreign:
        raise JoinError(
            f"{folder} holds {foreign[0]}, which no join wrote; give --out a new folder, or that of an earlier join"
        )
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JoinError(f"another join is writing {folder}; wait for it, or choose another folder") from error
        temporary = folder / _TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise JoinError(
                f"{folder}: the disk is full; a join needs two to three times the size of the log's impressions there"
            ) from error
        finally:
            shutil.rmtree(temporary)
    finally:
        os.close(handle)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file that carries its table's fingerprint. Equal row groups give equal bytes."""
    marked = schema.with_metadata({FINGERPRINT_KEY: fingerprint(schema).encode()})
    # Ids and scores hardly repeat, so that a dictionary of them would cost time and save nothing.
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    with pq.ParquetWriter(path, marked, compression="zstd", compression_level=1, use_dictionary=texts) as writer:
        yield writer


def final_name(path: Path, kind: str) -> str:
    """Return the name that a file gets: its kind, and a part of its content's SHA-256."""
    with path.open("rb") as file:
        return f"{kind}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.parquet"


def commit(folder: Path, files: dict[str, Path], manifest: Manifest) -> None:
    """Make the files a dataset: each gets its final name, then the manifest replaces the old one, in one step.

    A reader or a kill before that step finds the old dataset whole; after it, the new one. Old files go last.
    """
    for name, path in files.items():
        _sync(path)
        path.replace(folder / name)
    written = next(iter(files.values())).parent / MANIFEST
    written.write_bytes(manifest.encoded())
    _sync(written)
    _sync(folder)
    written.replace(folder / MANIFEST)
    _sync(folder)
    for path in folder.iterdir():
        if _is_ours(path) and path.name not in files:
            path.unlink()


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
