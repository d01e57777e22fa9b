"""The folder of what can be downloaded or computed again: public data, fitted trees, the demo's features."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/pinrank`, by default `~/.cache/pinrank`; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pinrank"
