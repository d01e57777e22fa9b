"""The tensors of a request from C++ and from NumPy: the same to the bit, for every manifest and every stored byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_client.codec import Rows, RowState
from feature_client.features import FetchedFeatures
from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup, Scalar, SequenceGroup
from model_store.bundle.manifest import Manifest, Surface
from model_store.bundle.tensor_sources import (
    EmbeddingSet,
    EmbeddingVector,
    QueryVector,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    SetSimilarities,
    Similarities,
    TensorInput,
)
from model_store.model import assembly
from model_store.model.assembly import Assembler, NumpyAssembly
from model_store.model.similarities import similarities
from model_store.model.tensor_plan import TensorPlan
from tests import tiny
from tests.model_store.model.random_manifests import check_equal, manifests


def stored(rng, dtype, count, layout):
    """Return rows of random bytes: on their own, with gaps between them, or backwards."""
    size = dtype.itemsize + (8 if layout == "gaps" else 0)
    octets = rng.integers(0, 256, (count, size), np.uint8)
    # Long runs of equal bits make infinities, zeros and subnormal numbers.
    octets[rng.random((count, size)) < 0.3] = rng.choice([0, 0x7F, 0x80, 0xFF, 0x7C])
    if layout == "gaps":
        return octets.reshape(-1).view(np.dtype([("gap", "V8"), ("row", dtype)]))["row"]
    rows = octets.reshape(-1).view(dtype)
    return rows[::-1] if layout == "backwards" else rows


def features(manifest, candidates, events, query, seed, layout="plain"):
    rng, needs = np.random.default_rng(seed), manifest.needs
    pins = candidates + events + (query is not None)
    acted = np.zeros(events, SequenceGroup.dtype)
    acted["action"] = rng.integers(0, 255, events)
    acted["time_ms"] = tiny.READ_MS - np.cumsum(rng.integers(-3, 10**9, events))[::-1]
    states = np.zeros(pins, np.uint8)
    if query is not None:
        states[-1] = query
    return FetchedFeatures(
        {g.name: Rows(stored(rng, g.dtype, 1, layout), np.zeros(1, np.uint8)) for g in needs.user_groups},
        {g.name: Rows(stored(rng, g.dtype, pins, layout), states) for g in needs.pin_groups},
        candidates,
        acted[::-1],
        query is not None,
        RowState.PRESENT,
        tiny.READ_MS,
    )


@given(
    manifest=manifests(),
    candidates=st.one_of(st.integers(0, 40), st.just(200)),
    events=st.integers(0, 9),
    query=st.sampled_from([None, RowState.PRESENT, RowState.MISSING]),
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(["plain", "gaps", "backwards"]),
    surface=st.sampled_from(["home", "related"]),
    given_query=st.booleans(),
)
def test_both_build_the_same_tensors(manifest, candidates, events, query, seed, layout, surface, given_query):
    fetched = features(manifest, candidates, min(events, manifest.sequence_length), query, seed, layout)
    vector = None
    if given_query and manifest.query_space is not None:
        vector = np.random.default_rng(seed).normal(size=manifest.query_space.dim).astype(np.float32)
    assembler = Assembler(manifest)
    assert isinstance(assembler._tensors, TensorPlan)
    with np.errstate(all="ignore"):
        expected = NumpyAssembly(manifest).batch(fetched, surface, vector)
    check_equal(assembler.assemble(fetched, surface, vector), expected)


def similar(length, dtype):
    """Return a manifest with similarities, with a sequence of this length or, for 0, without."""
    space = EmbeddingSpace(name="s", version=1, dim=9, dtype=dtype, scale=0.5)
    embedding = Embedding(name="e", space=space)
    found = {
        "user": EmbeddingVector(group="u", field="e"),
        "similar": Similarities(user="user", query="query", pin="pin"),
        "query": QueryVector(group="p", field="e"),
        "pin": EmbeddingVector(group="p", field="e"),
    }
    if length:
        found["similar"] = found["similar"].model_copy(update={"sequence": "vectors", "actions": "actions"})
        found |= {"vectors": SequenceEmbeddings(group="p", field="e"), "actions": SequenceActions()}
    return Manifest(
        **tiny.manifest_fields()
        | {
            "groups": tuple(
                FeatureGroup(name=name, version=1, entity=entity, fields=(embedding,))
                for name, entity in (("u", "user"), ("p", "pin"))
            ),
            "inputs": tuple(TensorInput(name=name, source=source) for name, source in found.items()),
            "surfaces": [Surface(name="home")],
            "sequence_length": length,
        },
        files={},
    )


@given(
    length=st.integers(0, 30),
    dtype=st.sampled_from(["float32", "float16", "int8"]),
    candidates=st.integers(0, 40),
    events=st.integers(0, 30),
    query=st.sampled_from([None, RowState.PRESENT, RowState.MISSING]),
    seed=st.integers(0, 2**32 - 1),
    given_query=st.booleans(),
)
def test_both_compute_the_same_similarities(length, dtype, candidates, events, query, seed, given_query):
    manifest = similar(length, dtype)
    fetched = features(manifest, candidates, min(events, length), query, seed)
    vector = np.random.default_rng(seed).normal(size=9).astype(np.float32) if given_query else None
    with np.errstate(all="ignore"):
        expected = NumpyAssembly(manifest).batch(fetched, "home", vector)
        compared = [
            expected.request[name][0] for name in ("user", "query", *(("vectors", "actions") if length else ()))
        ]
        compared += [] if length else [np.zeros((0, 9), np.float32), np.zeros(0, np.int64)]
        own = similarities(expected.candidate["pin"], *compared, len(manifest.sequence.actions))
    check_equal(Assembler(manifest).assemble(fetched, "home", vector), expected)
    np.testing.assert_array_equal(expected.candidate["similar"], own)
    assert expected.candidate["similar"].shape == (candidates, 6 + 2 * 2 if length else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "pin"}, "similarities compare a user's embedding with a pin's"),
        (
            {"query": "elsewhere"},
            "similarities compare an input 'elsewhere' of the kind QueryVector, and there is none",
        ),
        ({"pin": "query"}, "similarities compare an input 'query' of the kind EmbeddingVector, and there is none"),
        ({"actions": None}, "similarities to a sequence need both"),
    ],
)
def test_similarities_of_inputs_that_are_not_there_are_refused(changes, message):
    manifest = similar(3, "float16")
    wrong = tuple(
        one.model_copy(update={"source": one.source.model_copy(update=changes)}) if one.name == "similar" else one
        for one in manifest.inputs
    )
    with pytest.raises(ValueError, match=message):
        Manifest(**{**manifest.model_dump(), "inputs": wrong})


def with_set(**changes):
    """Return a manifest in which a user has three vectors, which candidates are compared with."""
    space = EmbeddingSpace(name="s", version=1, dim=4)
    other = space.model_copy(update={"content": "0123456789abcdef"})
    held = tuple(Embedding(name=f"e{i}", space=space) for i in range(3))
    found = {
        "interests": EmbeddingSet(group="u", fields=("e0", "e1", "e2")),
        "pin": EmbeddingVector(group="p", field="e"),
        "similar": SetSimilarities(set="interests", pin="pin"),
    } | changes
    return Manifest(
        **tiny.manifest_fields()
        | {
            "groups": (
                FeatureGroup(name="u", version=1, entity="user", fields=(*held, Embedding(name="e3", space=other))),
                FeatureGroup(name="p", version=1, entity="pin", fields=(Embedding(name="e", space=space),)),
                FeatureGroup(
                    name="w",
                    version=1,
                    entity="pin",
                    fields=(Embedding(name="e", space=EmbeddingSpace(name="w", version=1, dim=4)),),
                ),
            ),
            "inputs": tuple(TensorInput(name=name, source=source) for name, source in found.items()),
            "surfaces": [Surface(name="home")],
        },
        files={},
    )


@pytest.mark.parametrize("native", [True, False])
def test_a_set_is_its_vectors_in_their_order_and_candidates_are_compared_with_each(native):
    manifest = with_set(interests=EmbeddingSet(group="u", fields=("e2", "e0")))
    fetched = features(manifest, 5, 0, None, 0)
    user, pins = fetched.user["u"].rows, fetched.pins["p"].rows
    user["e0"], user["e2"], pins["e"] = 0, [3, 0, 4, 0], [0, 0, 2, 0]
    pins["e"][1] = [1, 1, 1, 1]
    batch = Assembler(manifest, native=native).assemble(fetched, "home")
    np.testing.assert_array_equal(batch.request["interests"], [[[3, 0, 4, 0], [0, 0, 0, 0]]])
    np.testing.assert_allclose(batch.candidate["similar"], [[0.8, 0], [0.7, 0], *[[0.8, 0]] * 3], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interests": EmbeddingSet(group="u", fields=("e0", "e3"))}, "are not distinct vectors of one space"),
        ({"interests": EmbeddingSet(group="u", fields=("e0", "e0"))}, "are not distinct vectors of one space"),
        ({"interests": EmbeddingSet(group="u", fields=("e0", "none"))}, "'none'"),
        ({"similar": SetSimilarities(set="pin", pin="pin")}, "an input 'pin' of the kind EmbeddingSet"),
        (
            {"interests": EmbeddingSet(group="p", fields=("e",))},
            "compare a user's embedding set with a pin's embedding",
        ),
        ({"pin": EmbeddingVector(group="w", field="e")}, "compare vectors of different spaces: s@1, w@1"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_set(**changes)


def one_field(field, source):
    group = FeatureGroup(name="g", version=1, entity="pin", fields=(Scalar(name="odd", dtype="int32"), field))
    inputs = (TensorInput(name="t", source=source),)
    return Manifest(
        **tiny.manifest_fields() | {"groups": (group,), "inputs": inputs, "surfaces": [Surface(name="a")]}, files={}
    )


def test_every_float16_becomes_the_float32_that_numpy_makes_of_it():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    space = EmbeddingSpace(name="s", version=1, dim=1024)
    manifest = one_field(Embedding(name="e", space=space), EmbeddingVector(group="g", field="e"))
    rows = np.zeros(64, manifest.groups[0].dtype)
    rows["e"] = halves.reshape(64, 1024)
    fetched = replace(features(manifest, 64, 0, None, 0), pins={"g": Rows(rows, np.zeros(64))})
    check_equal(Assembler(manifest).assemble(fetched, "a"), NumpyAssembly(manifest).batch(fetched, "a", None))


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [
        ("float64", [1e39, -1e39, 1e-46, 1 + 2**-24, 1 + 3 * 2**-24, np.inf, np.nan, -0.0, 5e-324]),
        ("int64", [2**24 + 1, 2**24 + 3, -(2**63), 2**63 - 1, 2**53 + 1]),
        ("int32", [2**24 + 1, 2**24 + 3, -(2**31), 2**31 - 1]),
        ("float32", [np.float32(1e-45), -0.0, np.inf]),
    ],
)
def test_numbers_that_float32_cannot_hold_are_rounded_as_numpy_rounds_them(dtype, numbers):
    manifest = one_field(Scalar(name="s", dtype=dtype), Scalars(group="g", fields=("s",)))
    rows = np.zeros(len(numbers), manifest.groups[0].dtype)
    rows["s"] = numbers
    fetched = replace(features(manifest, len(numbers), 0, None, 0), pins={"g": Rows(rows, np.zeros(len(rows)))})
    with np.errstate(all="ignore"):
        expected = rows["s"].astype(np.float32)
    np.testing.assert_array_equal(Assembler(manifest).assemble(fetched, "a").candidate["t"][:, 0], expected)


def test_tensors_begin_on_a_cache_line_and_outlive_the_features():
    manifest = tiny.manifest()
    batch = Assembler(manifest).assemble(tiny.fetched([1, 2, 3], [4, 5]), "home")
    assert {t.ctypes.data % 64 for t in (*batch.request.values(), *batch.candidate.values())} == {0}
    expected = NumpyAssembly(manifest).batch(tiny.fetched([1, 2, 3], [4, 5]), "home", None)
    _ = [np.full(1000, 7, np.uint8) for _ in range(50)]
    check_equal(batch, expected)


@pytest.mark.parametrize("native", [True, False])
def test_a_given_query_vector_takes_the_place_of_the_query_pin(native):
    assembler = Assembler(tiny.manifest(), native=native)
    fetched = tiny.fetched([1, 2], [], query=9)
    vector = np.array([1, 2, 3, 4], np.float32)
    assert assembler.assemble(fetched, "related", vector).request["query"].tolist() == [[1, 2, 3, 4]]
    found = assembler.assemble(fetched, "related").request["query"]
    np.testing.assert_array_equal(found[0], tiny.pin_rows(np.array([9]))["embedding"][0].astype(np.float32))


def of_pins(change):
    return lambda fetched: replace(fetched, pins={"pin_core": change(fetched.pins["pin_core"])})


def relaid(pins):
    """The same size and the same fields, in another order."""
    rows = np.zeros(len(pins.rows), [(name, pins.rows.dtype[name]) for name in reversed(pins.rows.dtype.names)])
    return Rows(rows, pins.states)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_pins(lambda pins: Rows(pins.rows[:1], pins.states)), r"'pin_core': expected 3 rows .*got shape \(1,\)"),
        (of_pins(lambda pins: Rows(pins.rows[None], pins.states)), r"'pin_core': .* got shape \(1, 3\)"),
        (of_pins(relaid), r"'pin_core': expected 3 rows of .*'embedding'.*'topic'.* got .*'topic'.*'embedding'"),
        (lambda fetched: replace(fetched, candidates=1), "'pin_core': expected 2 rows"),
        (lambda fetched: replace(fetched, events=tiny.events([1] * 4, [0] * 4)), "the sequence: expected up to 3 rows"),
        (lambda fetched: replace(fetched, events=np.zeros((1, 1), tiny.ACTIONS.dtype)), r"got shape \(1, 1\)"),
        (lambda fetched: replace(fetched, events=np.zeros(1)), "the sequence: .* of float64"),
        (lambda fetched: replace(fetched, user={"user_core": Rows(tiny.user_rows(np.arange(2)), np.zeros(2))}), "rows"),
    ],
    ids=["few", "of two dimensions", "other order", "many", "events", "nested events", "floats", "two users"],
)
def test_features_that_do_not_fit_the_manifest_are_refused(native, change, message):
    """Golden requests come from files, which may say anything."""
    with pytest.raises(ValueError, match=message):
        Assembler(tiny.manifest(), native=native).assemble(change(tiny.fetched([1, 2], [4])), "home")


@pytest.mark.parametrize("native", [True, False])
def test_a_group_or_a_surface_that_is_missing_is_named(native):
    assembler, fetched = Assembler(tiny.manifest(), native=native), tiny.fetched([1, 2], [4])
    with pytest.raises(KeyError, match="user_core"):
        assembler.assemble(replace(fetched, user={}), "home")
    with pytest.raises(KeyError, match="nowhere"):
        assembler.assemble(fetched, "nowhere")


def test_numpy_serves_where_the_library_is_not_built(monkeypatch):
    monkeypatch.setattr(assembly, "library_if_built", lambda: None)
    fetched = tiny.fetched([1, 2, 3], [4, 5])
    found = Assembler(tiny.manifest())
    assert isinstance(found._tensors, NumpyAssembly)
    check_equal(found.assemble(fetched, "home"), NumpyAssembly(tiny.manifest()).batch(fetched, "home", None))


@pytest.mark.parametrize("native", [True, False])
def test_a_model_that_does_not_read_the_sequence_may_be_given_a_longer_one(native):
    source = Scalars(group="pin_core", fields=("popularity",))
    inputs, surfaces = (TensorInput(name="t", source=source),), (Surface(name="home"),)
    fields = {"inputs": inputs, "surfaces": surfaces, "sequence": None, "sequence_length": 0}
    assembler = Assembler(Manifest(**tiny.manifest_fields() | fields, files={}), native=native)
    batch = assembler.assemble(tiny.fetched([1, 2], [4, 5, 6, 7]), "home")
    assert batch.candidate["t"][:, 0].tolist() == tiny.pin_rows(np.array([1, 2]))["popularity"].tolist()
