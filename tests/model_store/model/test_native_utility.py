"""The native library's utilities against numexpr's, to the bit."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_client.groups import Categorical, FeatureGroup, Scalar
from model_store.bundle.manifest import Head, Manifest
from model_store.model import utility
from model_store.model.expression import FUNCTIONS
from model_store.model.native_utility import NativeUtility, UnknownOperationError, agrees
from model_store.model.utility import UtilityError, load_utility
from tests import tiny
from tests.bits import equal_to_the_bit

#: A field of every dtype that a stored row can have, in an order that leaves most of them unaligned.
FIELDS = (
    Categorical(name="u8", cardinality=200),
    Scalar(name="f64", dtype="float64"),
    Categorical(name="u16", cardinality=60_000),
    Scalar(name="f32"),
    Categorical(name="u32", cardinality=2**31),
    Scalar(name="i64", dtype="int64"),
    Scalar(name="i32", dtype="int32"),
)
GROUP = FeatureGroup(name="pin_all", version=1, entity="pin", fields=FIELDS)
HEADS = ("save", "like", "hide")
COLUMNS = (*HEADS, *(f"pin.{field.name}" for field in FIELDS))


def manifest() -> Manifest:
    fields = tiny.manifest_fields()
    heads = tuple(Head(name=name, meaning=name) for name in HEADS)
    return Manifest(**fields | {"heads": heads, "groups": (*fields["groups"], GROUP)}, files={})


def table(*expressions: str, weights: tuple[float, ...] = ()) -> utility.UtilityTable:
    weights = weights or (1.0,) * len(expressions)
    home = ", ".join(f"p{i} = {weight!r}" for i, weight in enumerate(weights))
    lines = "\n".join(f'p{i} = "{expression}"' for i, expression in enumerate(expressions))
    text = f"[surfaces.home]\nweights = {{ {home} }}\n[surfaces.home.utilities]\n{lines}\n"
    text += '[surfaces.related]\nweights = { p = 1.0 }\nutilities = { p = "save" }\n'
    return load_utility(text.encode(), manifest())


def numbers(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return stored rows, and with them some numbers that cannot be stored but are met by intermediate results."""
    rows = np.frombuffer(rng.bytes(count * GROUP.dtype.itemsize), GROUP.dtype).copy()
    rows["f32"] = rng.choice([0.25, -0.0, 3e38, np.inf, np.nan, 1e-45, -7.5], count)
    rows["f64"] = rng.choice([0.25, -0.0, 1e308, -np.inf, np.nan, 5e-324, 2.5, 1e-9], count)
    return rows


def probabilities(rng: np.random.Generator, count: int) -> np.ndarray:
    found = rng.uniform(size=(count, len(HEADS)))
    found[rng.uniform(size=found.shape) < 0.1] = np.nan
    found[rng.uniform(size=found.shape) < 0.1] = rng.choice([0.0, 1.0, -np.inf])
    return found.astype(np.float32)


def both(loaded: utility.UtilityTable, heads: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    attributes = {a: rows[a.field] for a in loaded.attributes}
    found = loaded.party_utilities_of_rows("home", heads, attributes)
    return found, loaded.reference_utilities("home", heads, {a.name: v for a, v in attributes.items()})


def native(loaded: utility.UtilityTable) -> NativeUtility:
    home = loaded.surfaces["home"]
    return NativeUtility(loaded.heads, COLUMNS[len(HEADS) :], home.expressions, home.weights, loaded.logistic)


LEAVES = (*COLUMNS, *HEADS, *HEADS, "0", "1", "2", "0.5", "3.25", "1e-3", "1e300", "-0.0", "7")
POWERS = ("0", "1", "2", "3", "0.5", "1.5", "-1", "-2.5", "0.3", "51", "17")


@st.composite
def conditions(draw: st.DrawFn, depth: int) -> str:
    if depth == 0 or draw(st.booleans()):
        compare = draw(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
        return f"({draw(numbers_of(depth - 1))} {compare} {draw(numbers_of(depth - 1))})"
    one, two, three = (draw(conditions(depth - 1)) for _ in range(3))
    connect = draw(st.sampled_from(["&", "|", "==", "!=", "*", "+"]))
    return draw(st.sampled_from([f"({one} {connect} {two})", f"(~{one})", f"where({one}, {two}, {three})"]))


@st.composite
def numbers_of(draw: st.DrawFn, depth: int) -> str:
    """Draw an expression that is a number, nested up to so many times."""
    if depth <= 0:
        return draw(st.sampled_from(LEAVES))
    one, two = draw(numbers_of(depth - 1)), draw(numbers_of(depth - 1))
    match draw(st.integers(0, 6)):
        case 0 | 1:
            return f"({one} {draw(st.sampled_from(['+', '-', '*', '/', '%', '**']))} {two})"
        case 2:
            return f"({one} ** {draw(st.sampled_from(POWERS))})"
        case 3:
            return f"({draw(st.sampled_from('+-'))}{one})"
        case 4:
            name = draw(st.sampled_from([name for name in FUNCTIONS if name != "where"]))
            return f"{name}({one}, {two})" if FUNCTIONS[name] == 2 else f"{name}({one})"
        case 5:
            return f"where({draw(conditions(depth - 1))}, {one}, {two})"
        case _:
            return f"({draw(conditions(depth - 1))} * {one})"


@given(
    st.lists(st.integers(0, 4).flatmap(numbers_of), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(0, 200), st.just(1000)),
)
def test_utilities_are_numexprs_to_the_bit(expressions, seed, count):
    try:
        loaded = table(*expressions)
    except UtilityError:  # a constant part divides by zero, for example
        reject()
    if "home" not in loaded.native:  # for no other reason
        with pytest.raises(UnknownOperationError):
            native(loaded)
    rng = np.random.default_rng(seed)
    found, expected = both(loaded, probabilities(rng, count), numbers(rng, count))
    assert equal_to_the_bit(found, expected)


EVERY_OPERATION = [
    *(f"{name}({', '.join(('pin.f64', 'save', 'like')[:count])})" for name, count in FUNCTIONS.items() if count < 3),
    *(f"pin.f64 {operator} save" for operator in ("+", "-", "*", "/", "%", "**")),
    *(f"where(pin.f64 {operator} save, like, hide)" for operator in ("<", "<=", ">", ">=", "==", "!=")),
    "where((save > 0.5) & ~(like > 0.5) | (hide != 1), save, 2)",
    "where((save > 0.5) == (like > 0.5), save, 2)",
    "where((save > 0.5) != (like > 0.5), save, 2)",
    "where(where(save > 0.5, like > 0.5, hide > 0.5), save, 2)",
    "(save > 0.5) * 3 + (like > 0.5) / 7",
    "save ** 0 + -save + (+like)",
    "save ** 3 - like ** -2.5 + hide ** 0.5",
    "where(1 > 0, save, save + 1)",
    "0.25",
    "save",
]


@pytest.mark.parametrize("expression", EVERY_OPERATION)
def test_every_allowed_operation_runs_natively(expression):
    loaded = table(expression)
    assert set(loaded.native) == {"home", "related"}
    rng = np.random.default_rng(0)
    assert equal_to_the_bit(*both(loaded, probabilities(rng, 500), numbers(rng, 500)))


@given(st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_fields_of_every_dtype_are_read_where_they_stand(count, seed):
    loaded = table(*COLUMNS)
    rng = np.random.default_rng(seed)
    assert equal_to_the_bit(*both(loaded, probabilities(rng, count), numbers(rng, count)))


def test_probabilities_that_are_not_adjacent_are_read_too():
    heads = np.arange(18, dtype=np.float32).reshape(3, 6)[:, ::2]
    assert table("save + like + hide").party_utilities_of_rows("home", heads, {}).tolist() == [[6], [24], [42]]


def test_a_translation_agrees_only_if_every_bit_does():
    ours = native(table("save + pin.f64", "like * 0"))

    def changed(party: int, row: int, to: float):
        def reference(heads, attributes):
            found = ours.party_utilities(heads, attributes)
            assert np.isnan(found).any()
            assert np.isinf(found).any()
            found[np.flatnonzero(np.isfinite(found[:, party]))[row], party] += to
            return found

        return reference

    assert agrees(ours, 3, ours.party_utilities)
    assert agrees(ours, 3, changed(0, -1, 0.0))
    assert not agrees(ours, 3, changed(0, -1, 1e-3))
    assert not agrees(ours, 3, changed(1, 0, 5e-324))


def test_threads_share_a_translation():
    ours = native(table("log1p(save) * pin.f64", "like % 0.3", "where(hide > 0.5, save, like)"))
    rng = np.random.default_rng(0)
    inputs = [(probabilities(rng, 3000), [rng.normal(size=3000)]) for _ in range(8)]
    alone = [ours.party_utilities(*one) for one in inputs]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda one: ours.party_utilities(*one), inputs))
    assert all(equal_to_the_bit(one, other) for one, other in zip(alone, together, strict=True))


def test_columns_of_other_dtypes_are_converted():
    loaded = table("save + pin.f64")
    (attribute,) = loaded.attributes
    heads = np.full((3, 3), 0.5, np.float32)
    for values in (np.array([1, 2, 3], np.int8), np.array([1, 2, 3], ">f8"), np.array([1, 2, 3], np.float16)):
        assert loaded.party_utilities_of_rows("home", heads, {attribute: values})[:, 0].tolist() == [1.5, 2.5, 3.5]


def test_a_column_of_another_length_is_refused():
    loaded = table("save + pin.f64")
    with pytest.raises(ValueError, match="3 rows of probabilities, but attributes of"):
        loaded.party_utilities_of_rows("home", np.zeros((3, 3), np.float32), {loaded.attributes[0]: np.zeros(4)})


def test_a_surface_with_an_operation_that_is_not_native_stays_with_numexpr(caplog):
    with caplog.at_level(logging.DEBUG, utility.__name__):
        loaded = table("save", "exp(save > 0.5)")  # of a truth value, numexpr takes the exponential in float32
    assert set(loaded.native) == {"related"}
    assert "surface home stays with numexpr: the native library lacks registers of the kinds" in caplog.text
    found = loaded.party_utilities_of_rows("home", np.array([[0.25, 0, 0], [0.75, 0, 0]], np.float32), {})
    assert found.tolist() == [[0.25, 1.0], [0.75, np.float32(np.e)]]


def test_a_surface_whose_native_utilities_differ_stays_with_numexpr(monkeypatch, caplog):
    monkeypatch.setattr(utility, "agrees", lambda *_: False)
    with caplog.at_level(logging.DEBUG, utility.__name__):
        assert not table("save").native
    assert "surface home stays with numexpr: the native library computes other numbers here" in caplog.text


def test_without_the_library_every_surface_stays_with_numexpr(monkeypatch):
    monkeypatch.setattr(utility, "library_if_built", lambda: None)
    assert not table("save").native


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(0, 20), st.just(3)), elements=st.floats()),
    st.tuples(*[st.floats(-1e9, 1e9)] * 3),
)
def test_weights_are_summed_in_the_order_of_parties(parties, weights):
    combined = table("save", "like", "hide", weights=weights).combine("home", parties)
    with np.errstate(all="ignore"):
        expected = [np.float32(a * weights[0] + b * weights[1] + c * weights[2]) for a, b, c in parties]
    assert equal_to_the_bit(combined, np.array(expected, np.float32))


def test_probabilities_of_other_heads_are_refused():
    loaded = table("save")
    with pytest.raises(ValueError, match=r"expected probabilities of 3 heads, got \(5, 2\)"):
        loaded.party_utilities_of_rows("home", np.zeros((5, 2), np.float32), {})
