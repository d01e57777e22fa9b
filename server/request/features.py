"""Reads the features of requests from the feature store, through near caches for the loaded models' feature groups."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping

import numpy as np

from feature_client.features import FetchedFeatures
from feature_client.fetch import fetch
from feature_client.groups import FeatureNeeds
from feature_client.near_cache import NearCache, near_caches
from feature_client.packed_fetch import PackedFetch, new_packed_fetch
from feature_client.stores.store import Store


class FeatureReader:
    """Reads features. Belongs to one event loop, except for `new_caches`."""

    def __init__(self, store: Store, cache_bytes: int, stale_s: float, outage_s: float) -> None:
        """Create a reader without near caches.

        Args:
            store: the feature store; its owner starts and closes it.
            cache_bytes: memory for each model's near caches; 0 turns caching off.
            stale_s: maximum age of a cached row while the store can be read.
            outage_s: maximum age of a cached row while the store cannot be read.
        """
        self._store = store
        self._cache_bytes = cache_bytes
        self._stale_s = stale_s
        self._outage_s = outage_s
        self._caches: dict[bytes, NearCache] = {}
        #: How to read what a model needs in one call, with the needs, by their identity.
        self._packed: dict[int, tuple[FeatureNeeds, PackedFetch | None]] = {}

    @property
    def caches(self) -> Mapping[bytes, NearCache]:
        """The near caches by their groups' fingerprints; a live view that changes as models are loaded and dropped."""
        return self._caches

    def fetch(
        self, needs: FeatureNeeds, user_id: int, pin_ids: np.ndarray, query_pin_id: int | None, budget_s: float
    ) -> Awaitable[FetchedFeatures]:
        """Read the features that a model needs for a request; see `feature_client.fetch.fetch`."""
        known = self._packed.get(id(needs))
        if known is None or known[0] is not needs:
            known = self._packed[id(needs)] = needs, new_packed_fetch(needs, self._caches)
        return fetch(self._store, needs, user_id, pin_ids, query_pin_id, budget_s, self._caches, known[1])

    def new_caches(self, needs: FeatureNeeds) -> Mapping[bytes, NearCache]:
        """Make near caches for the groups that have none. This is slow: call it on another thread."""
        if not self._cache_bytes:
            return {}
        lacking = tuple(group for group in needs.pin_groups if group.fingerprint not in self._caches)
        # A model's groups share the memory. Two models that read different groups get the memory once each.
        share = self._cache_bytes * len(lacking) // max(1, len(needs.pin_groups))
        return near_caches(lacking, share, self._stale_s, self._outage_s) if lacking else {}

    def add_caches(self, caches: Mapping[bytes, NearCache]) -> None:
        """Use these caches, by group fingerprint, from now on."""
        self._caches.update(caches)
        self._packed.clear()

    def keep_caches(self, needed: Collection[FeatureNeeds]) -> None:
        """Drop the near caches of all groups that are not in `needed`."""
        read = {group.fingerprint for needs in needed for group in needs.pin_groups}
        for fingerprint in self._caches.keys() - read:
            del self._caches[fingerprint]
        self._packed.clear()
