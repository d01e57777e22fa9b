"""Remembers refused model versions across restarts, as a new process has no recent requests to show the fault again."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

_KEPT = 100
_REASON_CHARS_MAX = 2_000
_DIGEST = re.compile(r"^[0-9a-f]{64}$")


class Refusals:
    """Stores the reason in one file per version, named by digest. Several processes may share the folder."""

    def __init__(self, folder: Path | None, model: str) -> None:
        """Store the folder's path; nothing is read yet.

        Args:
            folder: the server's state folder; None keeps no refusals.
            model: the model's name.
        """
        self._folder = folder / "refused" / model if folder else None

    def reason(self, digest: str) -> str | None:
        """Return why a version was refused; None if it was not."""
        if self._folder is None or not _DIGEST.match(digest):
            return None
        try:
            with (self._folder / digest).open(encoding="utf-8", errors="replace") as file:
                return file.read(_REASON_CHARS_MAX)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("state_not_read", folder=str(self._folder), reason=str(error))
            return None

    def note(self, digest: str, reason: str) -> None:
        """Store that a version was refused."""
        if self._folder is None or not _DIGEST.match(digest):
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._folder / f".{secrets.token_hex(8)}"
            unfinished.write_text(reason[:_REASON_CHARS_MAX], encoding="utf-8")
            unfinished.replace(self._folder / digest)
            known = sorted(self._folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
            for path in known[:-_KEPT]:
                path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("state_not_written", folder=str(self._folder), reason=str(error))

    def forget(self, digest: str) -> None:
        """Delete a refusal, because the version has passed its checks."""
        if self._folder is None or not _DIGEST.match(digest):
            return
        try:
            (self._folder / digest).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("state_not_written", folder=str(self._folder), reason=str(error))
