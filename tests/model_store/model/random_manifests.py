"""Manifests of every kind that can be described, and a comparison of the tensors that they ask for."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from feature_client.groups import Categorical, Embedding, EmbeddingSpace, FeatureGroup, Scalar
from model_store.bundle.manifest import (
    Category,
    EmbeddingVector,
    Lineage,
    Manifest,
    QueryVector,
    Scalars,
    SequenceActions,
    SequenceEmbeddings,
    Surface,
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
def groups(draw, name, entity):
    fields = [
        *(Embedding(name=f"e{i}", space=space) for i, space in enumerate(draw(st.lists(SPACES, max_size=2)))),
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
    for field in group.fields:
        if isinstance(field, Categorical):
            yield Category(group=group.name, field=field.name)
        elif isinstance(field, Embedding):
            yield EmbeddingVector(group=group.name, field=field.name)
            if group.entity == "pin":
                yield SequenceEmbeddings(group=group.name, field=field.name)
                yield QueryVector(group=group.name, field=field.name)


@st.composite
def manifests(draw):
    described = [
        *(draw(groups(f"u{i}", "user")) for i in range(draw(st.integers(0, 2)))),
        *(draw(groups(f"p{i}", "pin")) for i in range(draw(st.integers(1, 2)))),
    ]
    found = [SurfaceIndex(), SequenceActions(), *(s for group in described for s in sources(draw, group))]
    chosen = draw(st.lists(st.sampled_from(found), max_size=12)) if draw(st.booleans()) else found
    return Manifest(
        name="m",
        version=1,
        groups=tuple(draw(st.permutations(described))),
        sequence=tiny.ACTIONS,
        sequence_length=draw(st.integers(1, 9)),
        inputs=tuple(TensorInput(name=f"t{i}", source=source) for i, source in enumerate(chosen)),
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
