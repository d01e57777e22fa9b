"""The log of a model: entries that are created once, each with all that holds after it; the newest is the present."""

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
#: Attempts to be the one who writes the next entry; each lost one means that somebody else's change went in.
_TRIES = 100
#: An entry says all of a model: some hundred bytes for every version that is not retired.
_ENTRY_BYTES_MAX = 64 << 20
#: A listing that was taken while entries were written may lack one of them; the next does not.
_LISTINGS = 3


def whoami() -> str:
    """Return who to name in the audit trail: a container's user id often has no name."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # which of them depends on the version of Python
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


class Entries:
    """The logs of a store's models. Safe to use from many processes and threads at once."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._where = objects.where
        #: The newest entry read of each model, and what the listing said of it; later ones are looked for from there.
        self._newest: dict[str, tuple[HistoryEntry, StoredObject | None]] = {}

    def head(self, model: str) -> HistoryEntry | None:
        """Return a model's newest entry, None before its first version.

        Cost: one listing, and one read when there is a new entry.

        Raises:
            ModelStoreError: the entry cannot be read, or is damaged, or one before it is missing. Where it is deleted,
                the entry before it is the newest again.
        """
        known, found = self._newest.get(checked_name(model), (None, None))
        entries = self._listed(model, known.number - 1 if known else 0)
        if known is not None and (not entries or entries[0].name != _name(known.number)):  # it was deleted
            entries = self._listed(model, 0)
        if not entries:
            self._newest.pop(model, None)
            return None
        if known is None or entries[-1] != found:
            known = self._entry(model, entries[-1].name)
            self._newest[model] = known, entries[-1]
        return known

    def _listed(self, model: str, beyond: int) -> list[StoredObject]:
        """List a model's entries with higher numbers, none of which may be missing between them."""
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
            f"{self._where}: {model}/log has {after} right after {before}; restore what is missing between them from a "
            f"backup, or delete {after} and what follows, to go back to the entry before"
        )

    def back(self, model: str) -> Iterator[HistoryEntry]:
        """Read a model's entries, newest first, as far as they are asked for."""
        for found in reversed(self._listed(checked_name(model), 0)):
            yield self._entry(model, found.name)

    def _entry(self, model: str, name: str) -> HistoryEntry:
        try:
            entry = HistoryEntry.model_validate_json(self._objects.get(f"{model}/log/{name}", _ENTRY_BYTES_MAX))
            if _name(entry.number) == name:
                return entry
            raise UnfitObjectError(f"it says that it is entry {entry.number}")
        except (UnfitObjectError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise ModelStoreError(
                f"{self._where}: {model}/log/{name} is damaged ({reason}); restore it from a backup, or delete it, and "
                "what follows, to go back to the entry before"
            ) from error

    def _written(self, entry: HistoryEntry) -> bytes:
        """Return an entry's content, which every reader takes: one that it did not would stop all changes."""
        try:
            content = entry.model_dump_json(indent=1).encode()
            HistoryEntry.model_validate_json(content)
        except ValueError as error:
            raise RefusedError(
                f"this change cannot be written down (who: {entry.by!r}, why: {entry.why!r}): {error}"
            ) from error
        if len(content) > _ENTRY_BYTES_MAX:
            raise RefusedError(
                f"this change would make an entry of {len(content):,} bytes, at most {_ENTRY_BYTES_MAX:,} are read; "
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
        """Make a change on the newest state; None when `decide` finds that nothing is to be changed."""
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
        raise ModelStoreError(f"{self._where}: other writers changed {model} {_TRIES} times meanwhile; try again")


def is_model(name: str) -> bool:
    """Tell whether a model can have this name."""
    return _MODEL.match(name) is not None


def _name(number: int) -> str:
    return f"{number:012}.json"


def checked_name(model: str) -> str:
    if not is_model(model):
        raise RefusedError(f"model name {model!r}: use lower-case letters, digits and -, starting with a letter")
    return model
