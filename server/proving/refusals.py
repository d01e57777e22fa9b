"""Which versions this server refused, kept over restarts: what recent requests showed, a new process cannot see."""

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
    """One file a version, named by digest, with the reason. Several processes may share a folder."""

    def __init__(self, folder: Path | None, model: str) -> None:
        """Remember.

        Args:
            folder: of this server's own; without one, nothing outlives the process.
            model: whose versions.
        """
        self._folder = folder / "refused" / model if folder else None

    def reason(self, digest: str) -> str | None:
        """Return why a version was refused; None for one that was not."""
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
        """Remember that a version was refused."""
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
        """Forget a refusal: the version was taken in after all."""
        if self._folder is None or not _DIGEST.match(digest):
            return
        try:
            (self._folder / digest).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("state_not_written", folder=str(self._folder), reason=str(error))
