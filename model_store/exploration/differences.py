"""How the exploration of two versions of a model differs, beside `model_store.model.compatibility`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from model_store.bundle.files import EXPLORATION, UTILITY, Bundle
from model_store.exploration.table import ExplorationError, read_exploration
from model_store.model.compatibility import Effect, Finding
from model_store.model.utility import UtilityError, load_utility


def exploration_findings(old: Bundle, new: Bundle) -> Iterator[Finding]:
    """Yield each field of `explore.toml` that differs between a version and the one that it would replace."""
    try:
        for bundle in (old, new):
            read_exploration(bundle, load_utility(bundle.files[UTILITY], bundle.manifest))
    except UtilityError:
        return  # `compare` reports the utility table
    except ExplorationError as error:
        yield Finding(EXPLORATION, "a valid table", str(error), Effect.CALLERS, "correct the table")
        return
    before, after = (dict(_fields("", tomllib.loads(b.files.get(EXPLORATION, b"").decode()))) for b in (old, new))
    for field in sorted(before.keys() | after.keys()):
        was, now = before.get(field, "none"), after.get(field, "none")
        if was != now:
            yield Finding(f"{EXPLORATION}: {field}", was, now, Effect.NOTE)


def _fields(where: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, Mapping):
            yield from _fields(path, value)
        else:
            yield path, str(value)
