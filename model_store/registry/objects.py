"""Whole objects by name, in a folder or in an S3-compatible bucket: all that a model store needs of a disk.

The contract: an object is there whole or not at all, also after a crash at any byte; `create` has one winner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ModelStoreError(Exception):
    """The store does not hold what was asked for, or refuses a change; the message says what would fix it."""


class NoObjectError(ModelStoreError):
    """There is no object of this name."""


class UnfitObjectError(ModelStoreError):
    """What lies under a name is no object, or larger than it may be."""


class NoVersionError(ModelStoreError):
    """There is no such version or label."""


class RefusedError(ModelStoreError):
    """A change that is not possible as things stand."""


class MovedError(RefusedError):
    """Somebody changed a label meanwhile."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing.

    Attributes:
        name: what follows the folder.
        size_bytes, modified_s: of its content.
        tag: another one once the object is replaced.
    """

    name: str
    size_bytes: int
    modified_s: float
    tag: str


class Objects(Protocol):
    """Names are lower-case parts joined by `/`. Every method raises ModelStoreError when the store cannot be used."""

    #: For messages.
    where: str

    def get(self, name: str, bytes_max: int) -> bytes:
        """Read an object of at most so many bytes. Raises NoObjectError, UnfitObjectError."""

    def put(self, name: str, content: bytes) -> None:
        """Write, durably; what was there is replaced."""

    def create(self, name: str, content: bytes) -> bool:
        """Write, durably, unless there is such an object; tell whether it was written."""

    def listed(self, folder: str, after: str = "") -> list[StoredObject]:
        """Return the objects right in a folder whose names sort after `after`, ascending; none for no folder."""

    def folders(self) -> list[str]:
        """Return the folders at the top, ascending."""

    def delete(self, name: str) -> None:
        """Remove; one that is gone is no error."""

    def sweep(self, folder: str, age_s_min: float) -> int:
        """Remove what killed writers left in a folder, if it is old enough; return how many."""
