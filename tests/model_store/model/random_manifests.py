"""Manifests of every kind that can be described, and a comparison of the tensors that they ask for."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import strategies as st

from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar
from model_store.bundle.manifest import Lineage, Manifest, Surface
from model_store.bundle.tensor_sources import (
    Category,
    EmbeddingSet,
    EmbeddingVector,
    QueryVector,
    Recency,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    SetSimilarities,
    Similarities,
    SurfaceIndex,
    TensorInput,
)
from tests import tiny

SPACES = st.builds(
    EmbeddingSpace,
    name=st.just("s"),
    version=st.just(1),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([64, 100])),
    dtype=st.sampled_from(["float32", "float16", "int8"]),
    scale=st.sampled_from([1.0, 0.1, 3e-7, 1e30]),
)
SCALARS = st.sampled_from(["float32", "float64", "int32", "int64"])
CARDINALITIES = st.sampled_from([2, 256, 257, 65_536, 65_537, 2**31])


@st.composite
def groups(draw, name, entity, shared):
    """Draw a group; `shared` is an embedding space that several groups may have."""
    spaces = st.one_of(st.just(shared), SPACES)
    fields = [
        *(Embedding(name=f"e{i}", space=space) for i, space in enumerate(draw(st.lists(spaces, max_size=3)))),
        *(Scalar(name=f"s{i}", dtype=dtype) for i, dtype in enumerate(draw(st.lists(SCALARS, max_size=5)))),
        *(Categorical(name=f"c{i}", cardinality=c) for i, c in enumerate(draw(st.lists(CARDINALITIES, max_size=2)))),
    ]
    fields = draw(st.permutations(fields)) or [Scalar(name="s0")]
    return FeatureGroup(name=name, version=1, entity=entity, fields=tuple(fields))


def sources(draw, group):
    """Return one source of each kind that the group can have, and two of its scalars."""
    scalars = [field.name for field in group.fields if isinstance(field, Scalar)]
    if scalars:
        for _ in range(2):
            yield Scalars(group=group.name, fields=tuple(draw(st.lists(st.sampled_from(scalars), min_size=1))))
    spaces = {field.space: None for field in group.fields if isinstance(field, Embedding)}
    for space in spaces:
        held = [field.name for field in group.fields if isinstance(field, Embedding) and field.space == space]
        yield EmbeddingSet(group=group.name, fields=tuple(draw(st.permutations(held))[: draw(st.integers(1, 3))]))
    for field in group.fields:
        if isinstance(field, Categorical):
            yield Category(group=group.name, field=field.name)
        elif isinstance(field, Embedding):
            yield EmbeddingVector(group=group.name, field=field.name)
            if group.entity == "pin":
                yield SequenceEmbeddings(group=group.name, field=field.name)
                yield QueryVector(group=group.name, field=field.name)


def compared(described, inputs):
    """Return inputs that compare others of them, with the sequence and without, where their dimensions are equal."""
    groups_of = {group.name: group for group in described}

    def of(kind, entity="pin"):
        found = [one for one in inputs if isinstance(one.source, kind)]
        return [one for one in found if groups_of[one.source.group].entity == entity]

    def dim(tensor):
        return groups_of[tensor.source.group].field(tensor.source.field).space.dim

    def space(tensor):
        first = tensor.source.fields[0] if isinstance(tensor.source, EmbeddingSet) else tensor.source.field
        return groups_of[tensor.source.group].field(first).space

    sets = product(of(EmbeddingSet, "user"), of(EmbeddingVector))
    found = [SetSimilarities(set=held.name, pin=pin.name) for held, pin in sets if space(held) == space(pin)]
    queries = of(QueryVector)
    if len({dim(query) for query in queries}) != 1:  # a caller's vector is in the space of all of them
        queries = []
    actions = [one.name for one in inputs if isinstance(one.source, SequenceActions)]
    for user, query, pin in product(of(EmbeddingVector, "user"), queries, of(EmbeddingVector)):
        sequences = [one.name for one in of(SequenceEmbeddings) if dim(one) == dim(query)]
        if dim(user) == dim(query) == dim(pin):
            of_three = {"user": user.name, "query": query.name, "pin": pin.name}
            pairs = [(None, None), *product(sequences, actions)]
            found += [Similarities(**of_three, sequence=one, actions=other) for one, other in pairs]
    return [TensorInput(name=f"c{number}", source=source) for number, source in enumerate(found)]


@st.composite
def manifests(draw):
    shared = draw(SPACES)
    described = [
        *(draw(groups(f"u{i}", "user", shared)) for i in range(draw(st.integers(0, 2)))),
        *(draw(groups(f"p{i}", "pin", shared)) for i in range(draw(st.integers(1, 2)))),
    ]
    found = [SurfaceIndex(), SequenceActions(), Recency(), *(s for group in described for s in sources(draw, group))]
    chosen = draw(st.lists(st.sampled_from(found), max_size=12)) if draw(st.booleans()) else found
    inputs = [TensorInput(name=f"t{i}", source=source) for i, source in enumerate(chosen)]
    comparisons = compared(described, inputs)
    if comparisons:
        inputs += draw(st.lists(st.sampled_from(comparisons), min_size=1, max_size=2, unique=True))
    inputs = draw(st.permutations(inputs))
    return Manifest(
        name="m",
        version=1,
        groups=tuple(draw(st.permutations(described))),
        sequence=tiny.ACTIONS,
        sequence_length=draw(st.integers(1, 9)),
        inputs=tuple(inputs),
        heads=tiny.manifest().heads,
        surfaces=tuple(Surface(name=name) for name in ("home", "related")),
        lineage=Lineage(data="", data_sha256="", command="", code="", seed=0),
        files={},
    )


def check_equal(native, numpy):
    assert native.row_splits.tolist() == numpy.row_splits.tolist()
    for ours, theirs in ((native.request, numpy.request), (native.candidate, numpy.candidate)):
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            expected = theirs[name]
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
            assert tensor.flags.c_contiguous
            bits = [array.reshape(-1).view(f"u{array.itemsize}") for array in (tensor, np.ascontiguousarray(expected))]
            differ = bits[0] != bits[1]
            if tensor.dtype == np.float32:  # NaNs are equal whatever their bits are
                differ &= ~(np.isnan(tensor).reshape(-1) & np.isnan(expected).reshape(-1))
            assert not differ.any(), (name, tensor.reshape(-1)[differ], expected.reshape(-1)[differ])
