"""Native scoring against NumPy's, to the bit, over random manifests, tables, features and requests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_client.codec import Rows, RowState
from feature_client.features import FetchedFeatures
from feature_client.groups import Categorical, Embedding, FeatureGroup, Scalar
from model_store.bundle.manifest import Calibration, Head, Manifest
from model_store.model.selection import select
from model_store.model.utility import load_utility
from pinrank.v1 import ranking_pb2
from server.request.scoring import NativeScoring, NumpyScoring, Scores, scoring_of
from tests import tiny
from tests.bits import equal_to_the_bit

FIELDS: tuple[Scalar | Categorical | Embedding, ...] = (
    Scalar(name="f32"), Scalar(name="f64", dtype="float64"), Scalar(name="i32", dtype="int32"),
    Scalar(name="i64", dtype="int64"), Categorical(name="u8", cardinality=200),
    Categorical(name="u16", cardinality=60_000), Categorical(name="u32", cardinality=2**31),
    Embedding(name="embedding", space=tiny.SPACE),
)  # fmt: skip
CALIBRATIONS = st.builds(Calibration, slope=st.floats(0.01, 100), intercept=st.floats(-50, 50))


@st.composite
def models(draw: st.DrawFn) -> tuple[Manifest, str]:
    """Draw a model that reads two pin groups, and the text of its utility table."""
    heads = tuple(
        Head(name=f"h{i}", meaning="", calibration=draw(CALIBRATIONS)) for i in range(draw(st.integers(1, 5)))
    )
    fields = draw(st.permutations(FIELDS))
    cut = draw(st.integers(1, len(fields) - 1))
    groups = [
        FeatureGroup(name=name, version=1, entity="pin", fields=own)
        for name, own in (("pin_one", tuple(fields[:cut])), ("pin_two", tuple(fields[cut:])))
    ]
    described = tiny.manifest_fields()
    manifest = Manifest(**described | {"heads": heads, "groups": (*described["groups"], *groups)}, files={})
    columns = [head.name for head in heads] + [f"pin.{f.name}" for f in fields if not isinstance(f, Embedding)]
    parties = draw(st.lists(st.lists(st.sampled_from(columns), min_size=1, max_size=3), min_size=1, max_size=4))
    weights = draw(st.lists(st.floats(-10, 10), min_size=len(parties), max_size=len(parties)))
    text = "[surfaces.home]\nweights = { " + ", ".join(f"p{i} = {w!r}" for i, w in enumerate(weights)) + " }\n"
    text += "[surfaces.home.utilities]\n"
    text += "".join(f'p{i} = "h0 * sqrt({" + ".join(one)}) - {one[0]}"\n' for i, one in enumerate(parties))
    text += '[surfaces.related]\nweights = { p = 1.0 }\nutilities = { p = "h0" }\n'
    return manifest, text


def fetched(manifest: Manifest, rng: np.random.Generator, candidates: int, apart: bool) -> FetchedFeatures:
    """Return random rows; `apart`: as views of stored values, which are not adjacent, and cannot be written."""
    pins = {}
    for group in manifest.needs.pin_groups:
        stored = np.frombuffer(rng.bytes((candidates + 2) * group.stored_dtype.itemsize), group.stored_dtype)
        rows = stored["row"] if apart else stored["row"].copy()
        pins[group.name] = Rows(rows, np.zeros(len(rows), np.uint8))
    events = np.zeros(2, tiny.ACTIONS.dtype)
    return FetchedFeatures(
        {}, pins, candidates, events, has_query_pin=False, sequence_state=RowState.PRESENT, read_ms=0
    )


def same(one: Scores, other: Scores, pin_ids: np.ndarray) -> None:
    for name in ("probabilities", "party_utilities", "utilities"):
        assert equal_to_the_bit(getattr(one, name), getattr(other, name)), name
    assert one.order.tolist() == other.order.tolist()
    assert (one.non_finite, one.scored, one.top) == (other.non_finite, other.scored, other.top)
    answer = ranking_pb2.RankResponse.FromString(one.packed.tobytes())
    assert answer.ByteSize() == len(one.packed) == len(other.packed)
    assert list(answer.pin_ids) == pin_ids[one.order].tolist()
    assert equal_to_the_bit(np.array(answer.utilities, np.float32), one.utilities[one.order])


@given(st.data(), models(), st.integers(0, 2**32 - 1), st.one_of(st.integers(1, 140), st.just(1000)))
def test_native_and_numpy_give_the_same_bits(data, model, seed, scored):
    manifest, text = model
    utility = load_utility(text.encode(), manifest)
    rng = np.random.default_rng(seed)
    rows = scored + data.draw(st.sampled_from([0, 0, 1, 70]), label="trimmed")
    logits = rng.normal(0, 5, (scored, len(manifest.heads))).astype(np.float32)
    logits[rng.uniform(size=logits.shape) < data.draw(st.sampled_from([0, 0.05, 1]))] = rng.choice([np.nan, np.inf])
    logits = logits[rng.integers(0, scored, scored)]  # some candidates are equal
    features = fetched(manifest, rng, scored, data.draw(st.booleans(), label="rows lie apart"))
    pin_ids = rng.integers(0, 2**64, rows, np.uint64)
    top_k = data.draw(st.sampled_from([0, 1, 10, rows, rows + 1]), label="top_k")
    chosen = scoring_of(manifest, utility, "home")
    assert isinstance(chosen, NativeScoring)
    found = chosen.score(logits, features, pin_ids, top_k)
    with np.errstate(all="ignore"):
        expected = NumpyScoring(utility, "home").score(logits, features, pin_ids, top_k)
    same(found, expected, pin_ids)
    assert np.isnan(found.utilities[scored:]).all()


@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32)), st.integers(0, 310))
def test_order_is_that_of_selection(popularity, top_k):
    manifest = tiny.manifest()
    table = tiny.UTILITY.replace("save - 2 * hide", "pin.popularity").replace("creator = 0.5", "creator = 0.0")
    table = table.replace("save * sqrt(pin.popularity)", "0 * save")
    scoring = scoring_of(manifest, load_utility(table.encode(), manifest), "home")
    assert isinstance(scoring, NativeScoring)
    rows = np.zeros(len(popularity), tiny.PINS.dtype)
    rows["popularity"] = popularity
    features = FetchedFeatures(
        {}, {"pin_core": Rows(rows, np.zeros(len(rows), np.uint8))}, len(rows), np.empty(0, tiny.ACTIONS.dtype),
        has_query_pin=False, sequence_state=RowState.PRESENT, read_ms=0,
    )  # fmt: skip
    logits, pin_ids = np.zeros((len(rows), 2), np.float32), np.arange(len(rows), dtype=np.uint64)
    found = scoring.score(logits, features, pin_ids, top_k)
    assert equal_to_the_bit(found.utilities + np.float32(0), popularity + np.float32(0))
    assert found.order.tolist() == select(popularity, top_k).tolist()


@pytest.mark.parametrize("kind", [NativeScoring, NumpyScoring])
@pytest.mark.parametrize(
    ("logits", "candidates", "rows"),
    [
        pytest.param((3, 2), 2, 3, id="more logits than features"),
        pytest.param((2, 3), 2, 3, id="another head"),
        pytest.param((3, 2), 3, 2, id="more logits than candidates"),
        pytest.param((0, 2), 0, 2, id="nothing"),
    ],
)
def test_logits_that_do_not_fit_the_request_are_refused(kind, logits, candidates, rows):
    manifest = tiny.manifest()
    utility = load_utility(tiny.UTILITY.encode(), manifest)
    scoring = NativeScoring(manifest, utility, "home") if kind is NativeScoring else NumpyScoring(utility, "home")
    features = tiny.fetched(list(range(1, candidates + 1)), [4])
    with pytest.raises(ValueError, match=r"logits of shape .* candidates"):
        scoring.score(np.zeros(logits, np.float32), features, np.arange(rows, dtype=np.uint64), 0)


def test_rows_of_another_group_are_refused():
    manifest = tiny.manifest()
    scoring = NativeScoring(manifest, load_utility(tiny.UTILITY.encode(), manifest), "home")
    features = tiny.fetched([1, 2], [])
    features.pins["pin_core"] = Rows(np.zeros(2, tiny.USERS.dtype), np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="2 rows of .* for 2 rows of group pin_core"):
        scoring.score(np.zeros((2, 2), np.float32), features, np.arange(2, dtype=np.uint64), 0)


def test_a_surface_that_stays_with_numexpr_is_scored_by_numpy():
    manifest = tiny.manifest()
    utility = load_utility(tiny.UTILITY.replace("save - 2 * hide", "exp(save > 0.5)").encode(), manifest)
    assert isinstance(scoring_of(manifest, utility, "home"), NumpyScoring)
    assert isinstance(scoring_of(manifest, utility, "related"), NativeScoring)
