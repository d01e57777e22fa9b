"""Orders pins again whose order was drawn, as the explorers of the models that answered do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from impressions.inspection.columns import Answers
from model_store.bundle.files import UTILITY, BundleError
from model_store.exploration.explorer import Explorer
from model_store.exploration.table import read_exploration
from model_store.model.utility import UtilityError, load_utility
from model_store.registry.objects import NoVersionError
from model_store.registry.store import ModelStore

#: What an order depends on, beside the row's pins: names of columns.
_KEY = ("model", "model_digest", "explorer", "surface")


class Replays:
    """Replays answers with the explorers of a model store. Reads each version once."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        #: An explorer, or why there is none.
        self._explorers: dict[tuple[str | None, ...], Explorer | str] = {}
        self._without: Counter[tuple[str, str]] = Counter()

    def misordered(self, answers: Answers) -> np.ndarray:
        """Find the answers whose order was drawn, and whose arm draws another one: bool, by row.

        Their lists must fit their pins. An answer whose explorer the store lacks is counted for `notes` instead.

        Raises:
            ModelStoreError: the store cannot be read.
        """
        found = np.zeros(answers.requests, bool)
        arms, keys = answers.texts("arm"), list(zip(*map(answers.texts, _KEY), strict=True))
        ids, ends = answers.request_ids, np.cumsum(answers.lengths("pin_ids"))
        pins, places, utilities = map(answers.flat, ("pin_ids", "places", "utilities"))
        for row in np.flatnonzero(answers.drawn_orders()).tolist():
            arm, key = arms[row], keys[row]
            explorer = self._explorers.get(key)
            if explorer is None:
                explorer = self._explorers[key] = self._explorer(*key)
            if isinstance(explorer, str):
                self._without[key[0] or "", explorer] += 1
                continue
            own = slice(0 if row == 0 else int(ends[row - 1]), int(ends[row]))
            found[row] = arm not in explorer.arms or not _same(
                explorer.replay(int(ids[row]), arm, pins[own], places[own], utilities[own])
            )
        return found

    def notes(self) -> Iterator[str]:
        """Yield what could not be replayed, and why."""
        for (model, why), count in sorted(self._without.items()):
            yield f"impressions: {count:,} orders that {model} drew were not drawn again: {why}"

    def _explorer(self, model: str, digest: str, explorer: str | None, surface: str) -> Explorer | str:
        name, _, version = model.rpartition("@")
        try:
            bundle = self._store.read(name, int(version))
            if bundle.digest != digest:
                return "the store has another version of that number; name the store that the servers read"
            utility = load_utility(bundle.files[UTILITY], bundle.manifest)
            exploration = read_exploration(bundle, utility)
        except (NoVersionError, BundleError, UtilityError) as error:
            return str(error)
        if exploration is None or exploration.digest != explorer:
            return "its explore.toml in the store is not the one that was in force"
        return exploration.surfaces.get(surface, f"its explore.toml does not explore {surface}")


def _same(order: np.ndarray) -> bool:
    return bool((order == np.arange(len(order))).all())
