"""The storage contract of a model store: named objects in a folder or an S3-compatible bucket.

An object exists completely or not at all, even after a crash at any byte. Of several writers that `create` the same
object, one succeeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ModelStoreError(Exception):
    """The store lacks an object or refuses a change. The message says how to fix it."""


class NoObjectError(ModelStoreError):
    """No object has this name."""


class UnfitObjectError(ModelStoreError):
    """The name does not lead to an object, or the object exceeds the limit."""


class NoVersionError(ModelStoreError):
    """The version or label does not exist."""


class RefusedError(ModelStoreError):
    """The current state does not allow the change."""


class MovedError(RefusedError):
    """Another writer has moved the label meanwhile."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing.

    Attributes:
        name: its name without the folder.
        size_bytes: size of its content.
        modified_s: Unix time of its last write, in seconds.
        tag: changes whenever the object is replaced.
    """

    name: str
    size_bytes: int
    modified_s: float
    tag: str


class Objects(Protocol):
    """Access to objects. Names are lower-case parts joined by `/`. Every method raises ModelStoreError on failure."""

    #: The folder or URL, for messages.
    where: str

    def get(self, name: str, bytes_max: int) -> bytes:
        """Read an object of at most `bytes_max` bytes. Raises NoObjectError, UnfitObjectError."""

    def put(self, name: str, content: bytes) -> None:
        """Write an object durably, and replace any older one."""

    def create(self, name: str, content: bytes) -> bool:
        """Write an object durably unless it exists. Return whether it was written."""

    def listed(self, folder: str, after: str = "") -> list[StoredObject]:
        """Return the objects directly in a folder whose names sort after `after`, ascending; [] if there is none."""

    def folders(self) -> list[str]:
        """Return the top-level folders, ascending."""

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""

    def sweep(self, folder: str, age_s_min: float) -> int:
        """Delete unfinished files of killed writers that are at least `age_s_min` seconds old. Return their number."""
