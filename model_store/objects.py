"""Whole objects by name, in a folder or in an S3-compatible bucket: all that a model store needs of a disk.

The contract: an object is there whole or not at all, also after a crash at any byte; `create` has one winner.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from feature_client.redaction import hidden

if TYPE_CHECKING:
    from obstore.store import ObjectStore

#: Names beginning so are no objects: writers' unfinished files.
_UNFINISHED = ".unfinished-"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
#: In the XML of a refusal.
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_SAFE = re.compile(r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$")


class ModelStoreError(Exception):
    """The store does not hold what was asked for, or refuses a change; the message says what would fix it."""


class NoObjectError(ModelStoreError):
    """There is no object of this name."""


class NoVersionError(ModelStoreError):
    """There is no such version or label."""


class RefusedError(ModelStoreError):
    """A change that is not possible as things stand."""


class MovedError(RefusedError):
    """Somebody changed a label meanwhile."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a listing; `name` is what follows the folder."""

    name: str
    size_bytes: int
    modified_s: float


class Objects(Protocol):
    """Names are lower-case parts joined by `/`. Every method raises ModelStoreError when the store cannot be used."""

    #: For messages.
    where: str

    def get(self, name: str) -> bytes:
        """Raises NoObjectError."""

    def put(self, name: str, content: bytes) -> None:
        """Write, durably; what was there is replaced."""

    def create(self, name: str, content: bytes) -> bool:
        """Write, durably, unless there is such an object; tell whether it was written."""

    def listed(self, folder: str, after: str = "") -> list[Found]:
        """Return the objects right in a folder whose names sort after `after`, ascending; none for no folder."""

    def folders(self) -> list[str]:
        """Return the folders at the top, ascending."""

    def delete(self, name: str) -> None:
        """Remove; one that is gone is no error."""

    def sweep(self, folder: str, age_s_min: float) -> int:
        """Remove what killed writers left in a folder, if it is old enough; return how many."""


def open_objects(url: str | Path) -> Objects:
    """Open `s3://bucket/prefix`, or a folder. Settings of a bucket come from the usual AWS_* variables."""
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return FolderObjects(Path(text))
    if scheme == "file":
        return FolderObjects(Path(text.removeprefix("file://")))
    if scheme == "s3":
        if "@" in text:
            raise ModelStoreError("model store s3://...: leave the keys out of the URL; AWS_* variables hold them")
        return BucketObjects(text)
    raise ModelStoreError(f"model store {text!r}: use a folder, or s3://bucket/prefix")


class FolderObjects:
    """Objects as files. Writers make a file beside the target, flush it to the disk, then give it its name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.where = str(root)

    def get(self, name: str) -> bytes:
        with _explained(self.where):
            try:
                return self._path(name).read_bytes()
            except FileNotFoundError as error:
                raise NoObjectError(f"{self.where} holds no {name}") from error

    def put(self, name: str, content: bytes) -> None:
        with _explained(self.where):
            path = self._path(name)
            unfinished = self._write(path.parent, content)
            unfinished.replace(path)
            _fsync(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        with _explained(self.where):
            path = self._path(name)
            unfinished = self._write(path.parent, content)
            try:
                os.link(unfinished, path)  # fails if the name is taken, unlike a rename
            except FileExistsError:
                return False
            finally:
                unfinished.unlink()
            _fsync(path.parent)
            return True

    def listed(self, folder: str, after: str = "") -> list[Found]:
        found = []
        with _explained(self.where):
            try:
                with os.scandir(self._path(folder)) as entries:
                    for entry in entries:
                        if entry.name > after and not entry.name.startswith("."):
                            status = entry.stat()
                            found.append(Found(entry.name, status.st_size, status.st_mtime))
            except FileNotFoundError:
                return []
        return sorted(found, key=lambda one: one.name)

    def folders(self) -> list[str]:
        with _explained(self.where):
            if not self._root.is_dir():
                raise ModelStoreError(f"no model store at {self._root}")
            return sorted(path.name for path in self._root.iterdir() if path.is_dir() and _SAFE.match(path.name))

    def delete(self, name: str) -> None:
        with _explained(self.where):
            self._path(name).unlink(missing_ok=True)

    def sweep(self, folder: str, age_s_min: float) -> int:
        swept = 0
        with _explained(self.where):
            for path in self._path(folder).glob(f"{_UNFINISHED}*"):
                try:
                    if time.time() - path.stat().st_mtime >= age_s_min:
                        path.unlink()
                        swept += 1
                except FileNotFoundError:  # its writer has just finished
                    continue
        return swept

    def _path(self, name: str) -> Path:
        if not _SAFE.match(name):
            raise ModelStoreError(f"object name {name!r}: lower-case letters, digits and ._- between slashes")
        return self._root / name

    def _write(self, folder: Path, content: bytes) -> Path:
        """Write a file that no reader sees, to the disk itself."""
        _make(folder)
        path = folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR | 0o044)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return path


def _make(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync(folder.parent)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelStoreError(f"model store {where}: {error.strerror or error}") from error


class BucketObjects:
    """Objects of an S3-compatible bucket, through obstore. `create` is a conditional write (If-None-Match)."""

    def __init__(self, url: str) -> None:
        self.where = url
        try:
            import obstore  # noqa: PLC0415 - folders do not need it
            from obstore.store import from_url  # noqa: PLC0415
        except ImportError as error:
            raise ModelStoreError(f"{url}: buckets need obstore: pip install 'pinrank[s3]'") from error
        self._api = obstore
        with _bucket_explained(url):
            plain = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://")
            self._store: ObjectStore = from_url(
                url,
                client_options={"timeout": "30s", "connect_timeout": "5s", "allow_http": plain},
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)},
            )

    def get(self, name: str) -> bytes:
        with _bucket_explained(self.where):
            try:
                return bytes(self._api.get(self._store, name).bytes())
            except FileNotFoundError as error:
                raise NoObjectError(f"{self.where} holds no {name}") from error

    def put(self, name: str, content: bytes) -> None:
        with _bucket_explained(self.where):
            self._api.put(self._store, name, content)

    def create(self, name: str, content: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: PLC0415

        with _bucket_explained(self.where):
            try:
                # One request: the condition holds for the whole object.
                self._api.put(self._store, name, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                # A first try whose answer was lost may have been ours.
                return self.get(name) == content
            return True

    def listed(self, folder: str, after: str = "") -> list[Found]:
        with _bucket_explained(self.where):
            offset = f"{folder}/{after}" if after else None
            metas = [meta for chunk in self._api.list(self._store, folder, offset=offset) for meta in chunk]
        found = [Found(m["path"].rpartition("/")[2], m["size"], m["last_modified"].timestamp()) for m in metas]
        return sorted(found, key=lambda one: one.name)

    def folders(self) -> list[str]:
        with _bucket_explained(self.where):
            return sorted(p.rpartition("/")[2] for p in self._api.list_with_delimiter(self._store)["common_prefixes"])

    def delete(self, name: str) -> None:
        with _bucket_explained(self.where):
            self._api.delete(self._store, name)

    def sweep(self, folder: str, age_s_min: float) -> int:  # noqa: ARG002 - an upload that was cut off leaves no object
        return 0


@contextmanager
def _bucket_explained(where: str) -> Iterator[None]:
    from obstore.exceptions import BaseError  # noqa: PLC0415

    try:
        yield
    except BaseError as error:
        # A bucket's answer quotes the key, and what was signed with it.
        reason = str(error).partition("\n")[0].partition("<")[0].strip()
        if code := _CODE.search(str(error)):
            reason = f"{reason} {code[1]}"
        reason = hidden(reason, (os.environ[name] for name in _KEYS if name in os.environ))
        raise ModelStoreError(f"model store {where}: {reason} (credentials and endpoint: AWS_* variables)") from error
