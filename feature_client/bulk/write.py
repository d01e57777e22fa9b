"""Write rows and whole sequences into a feature store."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from feature_client.action_times import AHEAD_MAX_MS, clock_ms
from feature_client.codec import encode_rows, encode_sequence
from feature_client.groups import FeatureGroup, SequenceGroup
from feature_client.stores.store import Store

_SAMPLE = 1_000


class ForeignValuesError(Exception):
    """Writing would replace values of another description, which a server may still read."""


async def refuse_foreign(store: Store, group: FeatureGroup | SequenceGroup, entity_ids: np.ndarray) -> None:
    """Check in a sample of entities that writing a group replaces no values of another description.

    Args:
        store: a started store.
        group: the group to write.
        entity_ids: uint64[N], the entities to write.

    Raises:
        ForeignValuesError: there are such values. The message says how to keep both.
    """
    sampled = np.random.default_rng(0).permutation(entity_ids)[:_SAMPLE]
    found = await store.multi_get(group.keys(sampled))
    foreign = [value for value in found if value is not None and not value.startswith(group.fingerprint)]
    if foreign:
        raise ForeignValuesError(
            f"the store has {group.ref} of another description ({len(foreign)} of {len(sampled)} sampled ids), such as "
            "with vectors of another space, and its readers would miss their features; use another feature store for "
            f"this model, or a model that reads {group.name} in another version, or replace them (--replace) once "
            "nobody reads them"
        )


async def write_rows(store: Store, group: FeatureGroup, entity_ids: np.ndarray, rows: np.ndarray) -> int:
    """Write one row per entity, replacing any existing one; return how many were written.

    Args:
        store: a started store.
        group: the group of the rows.
        entity_ids: uint64[N].
        rows: structured[N] of `group.dtype`.
    """
    return await store.multi_put(zip(group.keys(entity_ids), encode_rows(group, rows), strict=True))


async def write_sequences(
    store: Store, group: SequenceGroup, user_ids: np.ndarray, events: np.ndarray, splits: np.ndarray
) -> int:
    """Write whole sequences, replacing any existing ones; return how many were written.

    Args:
        store: a started store.
        group: the group with the vocabularies that the codes of the events refer to.
        user_ids: uint64[N].
        events: structured[sum K] of `SequenceGroup.dtype`, grouped by user, oldest first.
        splits: int64[N+1]; the events of user i are `events[splits[i]:splits[i + 1]]`.

    Raises:
        ValueError: an event is in the future, so every reader would ignore it. Nothing was written.
    """
    future = np.flatnonzero(events["time_ms"] > clock_ms() + AHEAD_MAX_MS)
    if len(future):
        user = user_ids[np.searchsorted(splits, future[0], side="right") - 1]
        raise ValueError(
            f"group {group.ref}: {len(future)} events are in the future; the first is of user {user}, with time_ms "
            f"{events['time_ms'][future[0]]}; write times as Unix times in milliseconds"
        )
    values = (encode_sequence(group, events[start:stop]) for start, stop in pairwise(splits))
    return await store.multi_put(zip(group.keys(user_ids), values, strict=True))
