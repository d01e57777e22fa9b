"""Read and append the entries of a model's history. Each entry is written once and holds the whole state after it."""

from __future__ import annotations

import getpass
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise

from pydantic import ValidationError

from model_store.registry.history import AnyChange, HistoryEntry, ModelState
from model_store.registry.objects import ModelStoreError, Objects, RefusedError, StoredObject, UnfitObjectError

_MODEL = re.compile(r"^[a-z][a-z0-9-]{0,59}$")
_ENTRY = re.compile(r"^([0-9]{12})\.json$")
#: Attempts to write the next entry. An attempt fails if another writer has written that entry first.
_TRIES = 100
#: Limit on an entry. It holds the whole state of a model: some hundred bytes for every version that is not retired.
_ENTRY_BYTES_MAX = 64 << 20
#: Listings to take before a gap counts as damage: one that runs while entries are written may miss an entry.
_LISTINGS = 3


def whoami() -> str:
    """Return `user@host` for the audit trail. In a container the user id often has no name, then it is `uid-N@host`."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # the type depends on the version of Python
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


class Entries:
    """The histories of a store's models. Safe to use from many processes and threads at once."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._where = objects.where
        #: By model, the newest entry that was read, and its line in the listing. Later listings start there.
        self._newest: dict[str, tuple[HistoryEntry, StoredObject | None]] = {}

    def head(self, model: str) -> HistoryEntry | None:
        """Return the newest entry of a model, or None before its first version.

        If the newest entry is deleted, the one before it is the newest again.

        Cost: one listing, and one read if there is a new entry.

        Raises:
            ModelStoreError: the entry cannot be read or is damaged, or an entry before it is missing.
        """
        known, found = self._newest.get(checked_name(model), (None, None))
        entries = self._listed(model, known.number - 1 if known else 0)
        if known is not None and (not entries or entries[0].name != _name(known.number)):  # the known entry was deleted
            entries = self._listed(model, 0)
        if not entries:
            self._newest.pop(model, None)
            return None
        if known is None or entries[-1] != found:
            known = self._entry(model, entries[-1].name)
            self._newest[model] = known, entries[-1]
        return known

    def _listed(self, model: str, beyond: int) -> list[StoredObject]:
        """List a model's entries with numbers above `beyond`. Raises ModelStoreError if one of them is missing."""
        for _ in range(_LISTINGS):
            listed = self._objects.listed(f"{model}/log", _name(beyond) if beyond else "")
            found = [one for one in listed if _ENTRY.match(one.name)]
            gaps = [
                (one.name, other.name)
                for one, other in pairwise(found)
                if int(other.name[:12]) != int(one.name[:12]) + 1
            ]
            if not gaps:
                return found
        before, after = gaps[0]
        raise ModelStoreError(
            f"{self._where}: {model}/log lacks entries between {before} and {after}; restore them from a backup, or "
            f"delete {after} and all later entries to return to {before}"
        )

    def back(self, model: str) -> Iterator[HistoryEntry]:
        """Yield the entries of a model, newest first. Each is read when the caller asks for it."""
        for found in reversed(self._listed(checked_name(model), 0)):
            yield self._entry(model, found.name)

    def _entry(self, model: str, name: str) -> HistoryEntry:
        try:
            entry = HistoryEntry.model_validate_json(self._objects.get(f"{model}/log/{name}", _ENTRY_BYTES_MAX))
            if _name(entry.number) == name:
                return entry
            raise UnfitObjectError(f"its content is entry {entry.number}")
        except (UnfitObjectError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise ModelStoreError(
                f"{self._where}: {model}/log/{name} is damaged ({reason}); restore it from a backup, or delete it and "
                "all later entries to return to the entry before it"
            ) from error

    def _written(self, entry: HistoryEntry) -> bytes:
        """Encode an entry, and check that readers accept it: an unreadable entry would block all further changes."""
        try:
            content = entry.model_dump_json(indent=1).encode()
            HistoryEntry.model_validate_json(content)
        except ValueError as error:
            raise RefusedError(
                f"this change cannot be recorded (who: {entry.by!r}, why: {entry.why!r}): {error}"
            ) from error
        if len(content) > _ENTRY_BYTES_MAX:
            raise RefusedError(
                f"the entry of this change has {len(content):,} bytes, the limit is {_ENTRY_BYTES_MAX:,}; "
                "give a shorter reason, or retire versions (pinrank model gc)"
            )
        return content

    def append(
        self,
        model: str,
        decide: Callable[[ModelState], AnyChange | None],
        by: str | None,
        why: str,
    ) -> HistoryEntry | None:
        """Apply a change to the newest state. Return None if `decide` finds nothing to change."""
        by = by or whoami()
        for _ in range(_TRIES):
            newest = self.head(model)
            state = newest.state if newest else ModelState()
            change = decide(state)
            if change is None:
                return None
            now = datetime.now(UTC)
            number = newest.number + 1 if newest else 1
            entry = HistoryEntry(
                number=number,
                at=now,
                by=by,
                why=why,
                change=change,
                state=change.after(state, model, now, by),
                nonce=secrets.token_hex(8),
            )
            content = self._written(entry)
            if self._objects.create(f"{checked_name(model)}/log/{_name(number)}", content):
                self._newest[model] = entry, None
                return entry
        raise ModelStoreError(f"{self._where}: other writers changed {model} in each of {_TRIES} attempts; try again")


def is_model(name: str) -> bool:
    """Return whether this is a valid model name."""
    return _MODEL.match(name) is not None


def _name(number: int) -> str:
    return f"{number:012}.json"


def checked_name(model: str) -> str:
    if not is_model(model):
        raise RefusedError(f"model name {model!r}: use lower-case letters, digits and -, starting with a letter")
    return model
