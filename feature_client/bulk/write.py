from __future__ import annotations

from itertools import pairwise

import numpy as np

from feature_client.action_times import AHEAD_MAX_MS, clock_ms
from feature_client.codec import encode_rows, encode_sequence
from feature_client.groups import FeatureGroup, SequenceGroup
from feature_client.stores.store import Store


async def write_rows(store: Store, group: FeatureGroup, entity_ids: np.ndarray, rows: np.ndarray) -> int:
    """Write one row per entity, replacing what was there; return how many.

    Args:
        store: a started store.
        group: whose rows these are.
        entity_ids: uint64[N].
        rows: structured[N] of `group.dtype`.
    """
    return await store.multi_put(zip(group.keys(entity_ids), encode_rows(group, rows), strict=True))


async def write_sequences(
    store: Store, group: SequenceGroup, user_ids: np.ndarray, events: np.ndarray, splits: np.ndarray
) -> int:
    """Write whole sequences, replacing what was there; return how many.

    Args:
        store: a started store.
        group: whose vocabularies the events' codes refer to.
        user_ids: uint64[N].
        events: structured[sum K] of `SequenceGroup.dtype`, by user, each oldest first.
        splits: int64[N+1]; user i's events are `events[splits[i]:splits[i + 1]]`.

    Raises:
        ValueError: an event in the future, which every reader would leave out; nothing was written.
    """
    future = np.flatnonzero(events["time_ms"] > clock_ms() + AHEAD_MAX_MS)
    if len(future):
        user = user_ids[np.searchsorted(splits, future[0], side="right") - 1]
        raise ValueError(
            f"group {group.ref}: {len(future)} events are in the future, the first of user {user}, "
            f"time_ms {events['time_ms'][future[0]]}; times are Unix times in milliseconds"
        )
    values = (encode_sequence(group, events[start:stop]) for start, stop in pairwise(splits))
    return await store.multi_put(zip(group.keys(user_ids), values, strict=True))
