"""The features and tensors of a request from one native call, and from one for each group: the same to the bit."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_client.action_times import clock_ms
from feature_client.codec import RowState, encode_rows, encode_sequence
from feature_client.fetch import fetch
from feature_client.groups import Categorical, Embedding, SequenceGroup
from feature_client.near_cache import near_caches
from feature_client.packed_fetch import new_packed_fetch
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.store import StoreUnavailableError
from model_store.model.assembly import Assembler, NumpyAssembly
from tests import tiny
from tests.feature_client.same_features import assert_same
from tests.model_store.model.random_manifests import check_equal, manifests

PINS, USERS = 300, 3


def rows_of(group, count, rng):
    rows = np.zeros(count, group.dtype)
    for field in group.fields:
        shape = rows[field.name].shape
        if isinstance(field, Categorical):
            rows[field.name] = rng.integers(0, field.cardinality, shape)
        elif isinstance(field, Embedding):
            rows[field.name] = rng.integers(-100, 100, shape)
        else:
            rows[field.name] = rng.normal(0, 1000, shape)
    return rows


def damaged(value, rng, one_in):
    """Return a value as it is, or what else may be stored in its place; None is nothing."""
    kind = rng.integers(0, 3 * one_in)
    if kind == 0:
        return None
    if kind == 1:
        return rng.bytes(len(value))
    return value[: rng.integers(0, len(value) + 1)] if kind == 2 else value


def events_of(rng):
    count = int(rng.integers(0, 12))
    events = np.zeros(count, SequenceGroup.dtype)
    events["pin_id"] = rng.integers(0, PINS, count)
    events["time_ms"] = clock_ms() + rng.choice([-1000, 10**10], count, p=[0.9, 0.1])
    events["action"], events["surface"] = rng.integers(0, 2, (2, count))
    return events


def stored(needs, rng, one_in):
    values = {}
    for groups, count in ((needs.user_groups, USERS), (needs.pin_groups, PINS)):
        for group in groups:
            keys = group.keys(np.arange(count, dtype=np.uint64))
            values |= zip(keys, encode_rows(group, rows_of(group, count, rng)), strict=True)
    for user in range(USERS):
        values[needs.sequence.key(user)] = encode_sequence(needs.sequence, events_of(rng))
    kept = {key: damaged(value, rng, one_in) for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None}


@given(
    manifest=manifests(),
    requests=st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=6),
    cached_bytes=st.sampled_from([1 << 10, 1 << 20]),
    stale_s=st.sampled_from([0.0, 60.0]),
    damaged_one_in=st.sampled_from([4, 50, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_call_gives_what_a_call_for_each_group_gives(
    manifest, requests, cached_bytes, stale_s, damaged_one_in, seed
):
    rng, assembler = np.random.default_rng(seed), Assembler(manifest)
    needs = assembler.needs
    store = MemoryStore(stored(needs, rng, damaged_one_in))
    near, far = (near_caches(needs.pin_groups, cached_bytes, stale_s) for _ in range(2))
    packed = new_packed_fetch(needs, near)
    assert packed is not None

    async def compare(user, ids, query):
        one = await fetch(store, needs, user, ids, query, near=near, packed=packed)
        many = await fetch(store, needs, user, ids, query, near=far)
        assert_same(one, many)
        with np.errstate(all="ignore"):
            # They were read one after the other, and ages are as of the read.
            expected = NumpyAssembly(manifest).batch(replace(many, read_ms=one.read_ms), "home", None)
        check_equal(assembler.assemble(one, "home"), expected)

    for candidates, has_query in requests:
        ids = rng.choice(PINS, candidates, replace=False).astype(np.uint64)
        user, query = int(rng.integers(0, USERS + 1)), int(rng.integers(0, PINS)) if has_query else None
        asyncio.run(compare(user, ids, query))
        asyncio.run(compare(user, ids, query))  # from the caches, if they hold it all
    for ours, theirs in zip(near.values(), far.values(), strict=True):
        assert ours.counts == theirs.counts
        for name in ("keys", "rows", "states", "counters", "notes"):
            mine, other = getattr(ours._arrays, name), getattr(theirs._arrays, name)
            assert np.asarray(mine).tobytes() == np.asarray(other).tobytes(), name


async def test_a_request_that_is_cached_makes_no_array_that_nothing_reads():
    assembler, store = Assembler(tiny.manifest()), MemoryStore(tiny.features())
    near = near_caches(assembler.needs.pin_groups, 1 << 20, 60)
    packed = new_packed_fetch(assembler.needs, near)
    ids = np.array([9, 2, 5], np.uint64)
    first = await fetch(store, assembler.needs, 1, ids, near=near, packed=packed)
    assert first.packed is None, "its pins came from the store"
    again = await fetch(store, assembler.needs, 1, ids, near=near, packed=packed)
    assert again.packed is not None
    assert again.complete
    check_equal(assembler.assemble(again, "home"), assembler.assemble(first, "home"))
    assert not again.pins._made


async def test_thousands_of_pins_are_read_as_a_few_are():
    needs = Assembler(tiny.manifest()).needs
    ids = np.arange(1, 3001, dtype=np.uint64)
    store = MemoryStore(tiny.features(pins=3000))
    near, far = (near_caches(needs.pin_groups, 1 << 22, 60) for _ in range(2))
    for _ in range(2):
        one = await fetch(store, needs, 1, ids, 7, near=near, packed=new_packed_fetch(needs, near))
        assert_same(one, await fetch(store, needs, 1, ids, 7, near=far))
    assert one.packed is not None


async def test_a_store_that_fails_is_told_and_its_rows_are_missing():
    class FailingStore(MemoryStore):
        fails = False

        async def multi_get(self, keys, timeout_s=None):
            if self.fails:
                raise StoreUnavailableError("gone")
            return await super().multi_get(keys, timeout_s)

    needs, store = Assembler(tiny.manifest()).needs, FailingStore(tiny.features())
    near = near_caches(needs.pin_groups, 1 << 20, 60)
    packed, ids = new_packed_fetch(needs, near), np.array([1, 2], np.uint64)
    await fetch(store, needs, 1, ids, near=near, packed=packed)
    store.fails = True
    found = await fetch(store, needs, 1, ids, near=near, packed=packed)
    assert found.store_failure == "gone"
    assert (found.user["user_core"].states.tolist(), found.sequence_state) == ([RowState.MISSING], RowState.MISSING)
    assert found.pins["pin_core"].states.tolist() == [RowState.PRESENT] * 2, "the near cache holds them"
    assert not found.complete


@pytest.mark.parametrize("lacking", ["a near cache", "the native places"])
def test_groups_that_native_code_cannot_look_up_are_read_one_by_one(lacking, monkeypatch):
    needs = Assembler(tiny.manifest()).needs
    near = near_caches(needs.pin_groups, 1 << 20, 60)
    if lacking == "a near cache":
        near.clear()
    else:
        monkeypatch.setattr(near[tiny.PINS.fingerprint]._places, "struct_at", None)
    assert new_packed_fetch(needs, near) is None
