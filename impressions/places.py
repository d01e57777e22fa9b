"""Where a log is kept: a folder or an S3-compatible bucket, and the names of its files."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from impressions.errors import LogError

if TYPE_CHECKING:
    import pyarrow.fs

#: The folder of a log in a folder that holds rows on their way to Parquet files.
SPOOL = "spool"
#: As in model stores.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_FILE = re.compile(r"\d{6}-[a-z0-9-]+\.parquet")
_STEM = re.compile(r"[a-z]+-\d{4}-\d{2}-\d{2}-\d{6}-[a-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or bucket.

    Attributes:
        where: as it was given, for messages.
        files: pyarrow's file system.
        root: the path in it.
        folder: the folder, if it is one.
    """

    where: str
    files: pyarrow.fs.FileSystem
    root: str
    folder: Path | None


def open_place(where: str) -> Place:
    """Open `file:///folder`, a plain path, or `s3://bucket/prefix`; buckets are configured by AWS_* variables.

    Raises:
        LogError: it is none of these, or pyarrow is not installed.
    """
    try:
        from pyarrow import fs  # noqa: PLC0415 - serving without a log does not need it
    except ModuleNotFoundError as error:
        raise LogError(
            "the impression log needs pyarrow; install it with: pip install 'pinrank[impressions]'"
        ) from error
    if not where.strip():
        raise LogError("the address of the log is empty; use file:///folder, or s3://bucket/prefix")
    scheme, separator, rest = where.partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else where)
        if separator and not path.is_absolute():
            raise LogError(f"{where}: write the whole path of the folder: file:///var/log/pinrank")
        return Place(where, fs.LocalFileSystem(), str(path.absolute()), path.absolute())
    if scheme != "s3" or not rest.strip("/"):
        raise LogError(f"{where!r}: use file:///folder, or s3://bucket/prefix")
    if "@" in rest:
        raise LogError("s3://...: remove the keys from the URL and set them in AWS_* variables")
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    options = {} if endpoint is None else {"endpoint_override": endpoint}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return Place(where, fs.S3FileSystem(**options), rest.strip("/"), None)


def check_writable(folder: Path, what: str) -> None:
    """Create a folder if there is none, and check that files in it can be written and locked.

    Raises:
        LogError: they cannot; the message calls the folder `what`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogError(f"{folder}: cannot create the {what}: {error.strerror}") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise LogError(f"{folder}: cannot write into the {what}: {error.strerror}") from error


def new_stem(table: str, number: int, now_s: float | None = None) -> str:
    """Name a file of a table so that no other process, here or elsewhere, uses the name.

    Args:
        table: the table's name.
        number: a number that this process has not used before.
        now_s: Unix time; the present if None.
    """
    now_s = time.time() if now_s is None else now_s
    day = time.strftime("%Y-%m-%d-%H%M%S", time.gmtime(now_s))
    host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-") or "host"
    return f"{table}-{day}-{host}-{os.getpid()}-{int(now_s % 1 * 1e6):06d}-{number}"


def is_stem(name: str) -> bool:
    """Return whether `new_stem` can have made a name."""
    return _STEM.fullmatch(name) is not None


def file_of(stem: str) -> str:
    """Return the path, in a log, of the Parquet file that a segment becomes: `TABLE/YYYY-MM-DD/HHMMSS-....parquet`."""
    table, year, month, day, rest = stem.split("-", 4)
    return f"{table}/{year}-{month}-{day}/{rest}.parquet"


def day_of(path: str) -> str | None:
    """Return the day, YYYY-MM-DD, of a file of a log by its path; None if the path is none of ours."""
    folder, _, name = path.rpartition("/")
    day = folder.rpartition("/")[2]
    return day if _FILE.fullmatch(name) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", day) else None
