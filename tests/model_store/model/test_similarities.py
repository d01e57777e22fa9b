from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.engine import FeatureBatch
from model_store.model import similarities as module
from model_store.model.similarities import (
    NEWEST,
    native_similarities,
    set_similarities,
    set_similarities_in_numpy,
    similarities,
    similarities_in_numpy,
    similarities_of_batch,
    similarity_names,
)

DIM, LENGTH, ACTIONS = 4, 9, 3


def vectors(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def slow(pins, user, query, sequence, kinds, actions):
    """Compute every column from its words, one number at a time."""

    def cosine(a, b):
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / lengths) if lengths else 0.0

    past = [(kind, vector) for kind, vector in zip(kinds, sequence, strict=True) if kind]
    groups = [past, past[:NEWEST], *([(k, v) for k, v in past if k == a + 1] for a in range(actions))]
    rows = []
    for pin in pins:
        row = [float(pin @ user), float(pin @ query)]
        for group in groups:
            found = [cosine(pin, vector) for _, vector in group]
            row += [max(found), float(np.mean(found))] if found else [0.0, 0.0]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("way", [similarities, similarities_in_numpy])
@pytest.mark.parametrize("length", [0, 1, NEWEST, NEWEST + 1, LENGTH])
def test_the_columns_are_what_their_names_say(way, length):
    rng = np.random.default_rng(length)
    kinds = np.zeros(LENGTH, np.int64)
    kinds[:length] = rng.integers(1, ACTIONS, length)  # nothing is of the last kind
    sequence = vectors(rng, LENGTH, DIM) * (kinds > 0)[:, None]
    sequence[1] = 0  # a pin without a vector is part of the sequence
    pins, user, query = vectors(rng, 6, DIM), vectors(rng, DIM), vectors(rng, DIM)
    pins[2] = 0
    found = way(pins, user, query, sequence, kinds, ACTIONS)
    assert found.dtype == np.float32
    assert found.shape == (6, len(similarity_names(["save", "like", "hide"])))
    np.testing.assert_allclose(found, slow(pins, user, query, sequence, kinds, ACTIONS), atol=1e-6)
    np.testing.assert_array_equal(found[:, -2:], 0)


def test_names_follow_the_actions():
    assert similarity_names(["save"]) == (
        *("user", "query", "sequence_max", "sequence_mean", "newest_5_max", "newest_5_mean", "save_max", "save_mean"),
    )


def test_a_batch_gives_each_request_its_own_similarities():
    rng = np.random.default_rng(0)
    splits = np.array([0, 3, 3, 7], np.int32)
    kinds = rng.integers(1, ACTIONS + 1, (3, LENGTH))
    request = {
        "user_embedding": vectors(rng, 3, DIM),
        "query": vectors(rng, 3, DIM),
        "sequence_embeddings": vectors(rng, 3, LENGTH, DIM),
        "sequence_actions": kinds,
    }
    pins = vectors(rng, 7, DIM)
    found = similarities_of_batch(FeatureBatch(request, {"pin_embedding": pins}, splits), ACTIONS)
    for number in (0, 2):
        rows = slice(splits[number], splits[number + 1])
        of_one = [request[name][number] for name in request]
        np.testing.assert_array_equal(found[rows], similarities(pins[rows], *of_one, ACTIONS))


def test_a_vector_that_is_not_finite_spoils_its_own_row_only():
    rng = np.random.default_rng(1)
    pins = vectors(rng, 3, DIM)
    pins[1, 0] = np.nan
    sequence = vectors(rng, LENGTH, DIM)
    found = similarities(pins, pins[0], pins[2], sequence, np.ones(LENGTH, np.int64), 1)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


@given(
    candidates=st.integers(0, 20),
    dim=st.sampled_from([1, 2, 16, 31, 32]),
    length=st.integers(0, 40),
    entries=st.integers(0, 40),
    actions=st.integers(0, 20),
    odd=st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, 3e38]),
    share=st.sampled_from([0, 0.02, 0.5, 1]),
    seed=st.integers(0, 1 << 32),
)
def test_native_code_and_numpy_give_the_same_bits(candidates, dim, length, entries, actions, odd, share, seed):
    rng = np.random.default_rng(seed)
    of_one = [vectors(rng, *shape) for shape in ((candidates, dim), (dim,), (dim,), (length, dim))]
    for array in of_one:
        array[rng.random(array.shape) < share] = odd
    kinds = np.zeros(length, np.int64)
    kinds[:entries] = rng.integers(1, actions + 5, min(entries, length))  # some are none of the kinds
    assert native_similarities() is not None
    with np.errstate(all="ignore"):
        ours, reference = (way(*of_one, kinds, actions) for way in (similarities, similarities_in_numpy))
    assert ours.shape == reference.shape == (candidates, 6 + 2 * actions if length else 2)
    nans = np.isnan(reference)
    np.testing.assert_array_equal(np.isnan(ours), nans)
    np.testing.assert_array_equal(ours[~nans].view(np.uint32), reference[~nans].view(np.uint32))


@pytest.mark.parametrize("way", [set_similarities, set_similarities_in_numpy])
def test_each_vector_of_a_set_has_its_own_cosine(way):
    rng = np.random.default_rng(5)
    pins, held = vectors(rng, 6, DIM), vectors(rng, 3, DIM)
    pins[2], held[1] = 0, 0
    found = way(pins, held)
    assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
    lengths = np.linalg.norm(pins, axis=1)[:, None] * np.linalg.norm(held, axis=1)
    np.testing.assert_allclose(found, pins @ held.T / np.where(lengths == 0, np.inf, lengths), atol=1e-6)
    out = np.empty((6, 3), np.float32)
    if way is set_similarities:
        assert way(pins, held, out) is out
        np.testing.assert_array_equal(out, found)


@given(
    candidates=st.integers(0, 20),
    dim=st.sampled_from([1, 2, 16, 31, 32]),
    count=st.integers(1, 20),
    odd=st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, 3e38]),
    share=st.sampled_from([0, 0.02, 0.5, 1]),
    seed=st.integers(0, 1 << 32),
)
def test_native_code_and_numpy_give_the_same_bits_for_sets(candidates, dim, count, odd, share, seed):
    rng = np.random.default_rng(seed)
    pins, held = vectors(rng, candidates, dim), vectors(rng, count, dim)
    for array in (pins, held):
        array[rng.random(array.shape) < share] = odd
    with np.errstate(all="ignore"):
        ours, reference = (way(pins, held) for way in (set_similarities, set_similarities_in_numpy))
    assert ours.shape == reference.shape == (candidates, count)
    nans = np.isnan(reference)
    np.testing.assert_array_equal(np.isnan(ours), nans)
    np.testing.assert_array_equal(ours[~nans].view(np.uint32), reference[~nans].view(np.uint32))


def test_without_the_library_numpy_does_it(monkeypatch):
    rng = np.random.default_rng(3)
    of_one = vectors(rng, 5, DIM), vectors(rng, DIM), vectors(rng, DIM), vectors(rng, LENGTH, DIM)
    kinds = rng.integers(1, ACTIONS + 1, LENGTH)
    expected = similarities(*of_one, kinds, ACTIONS)
    monkeypatch.setattr(module, "native_similarities", lambda: None)
    np.testing.assert_array_equal(similarities(*of_one, kinds, ACTIONS), expected)
