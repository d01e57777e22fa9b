"""The errors of the impression log."""

from __future__ import annotations


class LogError(Exception):
    """The log cannot be opened, written or read. The message names the place, and what to do."""
