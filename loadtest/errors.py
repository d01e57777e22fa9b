from __future__ import annotations


class LoadError(Exception):
    """The load cannot be offered; the message names the fix."""
