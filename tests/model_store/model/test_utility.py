from __future__ import annotations

import hashlib

import numexpr
import numpy as np
import pytest

from model_store.bundle.manifest import Manifest
from model_store.model.expression import ExpressionError, compile_expression
from model_store.model.utility import UtilityError, check_time, load_utility, weighted_sum
from tests import tiny


def table(expression, surface="home"):
    return tiny.UTILITY.replace('"save - 2 * hide"', f'"{expression}"').encode()


def with_thetas(thetas):
    return tiny.UTILITY.replace("[surfaces.home]", f"[surfaces.home]\nat_least = {thetas}").encode()


def evaluate(expression, probabilities):
    loaded = load_utility(table(expression), tiny.manifest())
    fetched = tiny.fetched(list(range(1, len(probabilities) + 1)), [])
    return loaded.party_utilities("home", np.array(probabilities, np.float32), fetched)[:, 0]


P = [[0.5, 0.1], [0.2, 0.95]]
POPULARITY = tiny.pin_rows(np.array([1, 2]))["popularity"].astype(np.float64)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("save", [0.5, 0.2]),
        ("save - 2 * hide", [0.3, -1.7]),
        ("-save ** 2", [-0.25, -0.04]),
        ("log1p(save) + pin.popularity", np.log1p([0.5, 0.2]) + POPULARITY),
        ("where((hide > 0.9) | (save < 0.1), 0, save)", [0.5, 0.0]),
        ("pin.topic + 0 * save", [1.0, 2.0]),
        ("1 + 1", [2.0, 2.0]),
        ("0.25", [0.25, 0.25]),
        ("save / 2", [0.25, 0.1]),
        ("1 / 2", [0.5, 0.5]),
    ],
)
def test_expression_value(expression, expected):
    np.testing.assert_allclose(evaluate(expression, P), expected, rtol=1e-6)


def test_an_expression_may_have_two_thousand_characters():
    assert evaluate("save" + " " * 1994 + "+1", P).tolist() == pytest.approx([1.5, 1.2])


#: The functions that an expression may call, with how many arguments, and what they are in NumPy.
FUNCTIONS = {
    "exp": (1, np.exp), "expm1": (1, np.expm1), "log": (1, np.log), "log1p": (1, np.log1p), "log10": (1, np.log10),
    "sqrt": (1, np.sqrt), "abs": (1, np.abs), "tanh": (1, np.tanh), "sin": (1, np.sin), "cos": (1, np.cos),
    "floor": (1, np.floor), "ceil": (1, np.ceil), "arctan2": (2, np.arctan2), "maximum": (2, np.maximum),
    "minimum": (2, np.minimum),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_numpys_and_takes_so_many_arguments(name):
    count, function = FUNCTIONS[name]
    columns = np.array(P, np.float32).astype(np.float64).T[:count]
    np.testing.assert_allclose(evaluate(f"{name}({', '.join(('save', 'hide')[:count])})", P), function(*columns))
    for wrong in (count - 1, count + 1):
        with pytest.raises(UtilityError, match=f"{name} takes {count} arguments"):
            load_utility(table(f"{name}({', '.join(['save'] * wrong)})"), tiny.manifest())


def test_a_condition_takes_three_arguments():
    for wrong in ("where(save > 0, 1)", "where(save > 0, 1, 2, 3)", "where(save > 0, x=1)"):
        with pytest.raises(UtilityError, match="where takes 3 arguments"):
            load_utility(table(wrong), tiny.manifest())


def test_a_table_is_known_by_the_digest_of_its_text():
    assert (
        load_utility(tiny.UTILITY.encode(), tiny.manifest()).digest == hashlib.sha256(tiny.UTILITY.encode()).hexdigest()
    )


def test_importing_it_keeps_numexpr_to_one_thread():
    assert numexpr.set_num_threads(1) == 1  # what was set before


def test_a_field_of_two_pin_groups_cannot_be_named():
    fields = tiny.manifest_fields()
    both = Manifest(**fields | {"groups": (*fields["groups"], tiny.changed(tiny.PINS, name="pin_other"))}, files={})
    with pytest.raises(UtilityError, match=r"pin\.popularity is in two groups: pin_core@1 and pin_other@1"):
        load_utility(tiny.UTILITY.encode(), both)


def test_only_the_attributes_that_some_expression_reads_are_read():
    assert [one.name for one in load_utility(tiny.UTILITY.encode(), tiny.manifest()).attributes] == ["pin.popularity"]


def test_weights_combine_the_parties():
    loaded = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    assert loaded.combine("home", np.array([[1.0, 2.0], [0.0, -4.0]])).tolist() == [2.0, -2.0]


def test_any_number_of_weights_combine_the_parties():
    weights = np.array([[1.0, 0.5], [1.0, 0.0], [0.0, 2.0]])
    found = weighted_sum(np.array([[1.0, 2.0], [0.0, -4.0]]), weights)
    assert found.tolist() == [[2.0, -2.0], [1.0, 0.0], [4.0, -8.0]]


def test_a_surface_may_state_the_least_that_parties_must_get():
    surfaces = load_utility(with_thetas("{ creator = 0.42 }"), tiny.manifest()).surfaces
    assert surfaces["home"].at_least == {"creator": 0.42}
    assert surfaces["related"].at_least == {}


def test_non_finite_probability_stays_non_finite():
    assert np.isnan(evaluate("save - 2 * hide", [[np.nan, 0.1]])).all()


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "saves",
            "surfaces.home.utilities.pinner: unknown name 'saves'; use one of hide, pin.popularity, pin.topic, save",
        ),
        ("pin.colour * save", "unknown name 'pin.colour'"),
        ("pin.embedding", "unknown name 'pin.embedding'"),
        ("user.age", "unknown name 'user.age'"),
        ("__import__('os').system('true')", "unknown function"),
        ("sqroot(save)", "unknown function 'sqroot'; use one of abs"),
        ("sqrt(save, hide)", "sqrt takes 1 arguments"),
        ("save > 0.5", "bool, not a number; use where"),
        ("save +", "invalid syntax"),
        ("'save'", "not a number"),
        ("True", "not a number"),
        ("[save]", "List is not allowed"),
        ("(lambda: save)()", "unknown function"),
        ("save if hide else 0", "IfExp is not allowed"),
        ("save and hide", "BoolOp is not allowed"),
        ("save[0]", "Subscript is not allowed"),
        ("1 / 0", "cannot compile"),
        ("log(0)", "constant and not finite: -inf"),
        ("1e400", "constant and not finite: inf"),
        ("9" * 400, f"pinner: {'9' * 20}... is too large"),
        ("(" * 300 + "save" + ")" * 300, "pinner"),
        ("-" * 1990 + "save", "pinner: the expression "),
        ("-save" * 390, "pinner: the expression "),
        ("save ** 10 ** 10 ** 10", "cannot compile"),
        ("exp(" * 60 + "save" + ")" * 60 + "+ 0 * save" * 30, "the expression has 120 operations, the limit is 100"),
        ("+".join(["save"] * 102), "the expression has 101 operations, the limit is 100"),
        ("-" * 101 + "save", "the expression has 101 operations, the limit is 100"),
        ("exp(" * 300 + "save" + ")" * 300, "too many nested parentheses"),
        ("save\\u0000", "pinner: "),
        ("save + " * 400 + "save", "the expression has 2804 characters, the limit is 2000"),
        ("", "invalid syntax"),
    ],
)
def test_bad_expression_is_a_named_error(expression, message):
    with pytest.raises(UtilityError) as raised:
        load_utility(table(expression), tiny.manifest())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"surfaces = [", "not TOML"),
        (b"\xff", "not TOML"),
        (b"a = " + b"[" * 60_000, "not TOML"),
        (b"[surfaces.home]\nweights = {}\n", "surfaces.home.utilities: Field required"),
        (tiny.UTILITY.replace("pinner = 1.0, creator", "creator").encode(), "weights are for ['creator']"),
        (tiny.UTILITY.replace("surfaces.related", "surfaces.shop").encode(), "surfaces ['home', 'shop']"),
        (tiny.UTILITY.replace("1.0", "nan").encode(), "finite number"),
        (tiny.UTILITY.replace("[surfaces.home]", "[surfaces.home]\nextra = 1").encode(), "surfaces.home.extra"),
        (
            with_thetas("{ creators = 0.4 }"),
            "surface 'home': at_least names creators, but the parties are pinner, creator",
        ),
        (with_thetas("{ creator = inf }"), "surfaces.home.at_least.creator: Input should be a finite number"),
        (b"# " + b"x" * 1_000_000 + b"\n" + tiny.UTILITY.encode(), "the utility table has 1,0"),
        (b"[" + b"a." * 30_000 + b"a]\nb = 1", "the utility table"),
        (b"a = " + b"{ b = " * 10_000, "the utility table is not TOML"),
        (
            tiny.UTILITY.replace(
                "[surfaces.related.utilities]",
                "\n".join(["[surfaces.related.utilities]", *(f"p{i} = '0'" for i in range(16))]),
            ).encode(),
            "surfaces.related.utilities: Dictionary should have at most 16 items",
        ),
        (with_thetas('{ creator = "+10%" }'), "surfaces.home.at_least.creator: Input should be a valid number"),
    ],
)
def test_bad_table_is_a_named_error(content, message):
    with pytest.raises(UtilityError) as raised:
        load_utility(content, tiny.manifest())
    assert message in str(raised.value)


def test_an_expression_may_have_a_hundred_operations():
    assert evaluate("+".join(["save"] * 101), P).tolist() == pytest.approx([50.5, 20.2])


def test_an_expression_may_read_32_names():
    heads = [f"h{i}" for i in range(33)]
    assert len(compile_expression("+".join(heads[:32]), set(heads)).names) == 32
    with pytest.raises(ExpressionError, match="reads 33 heads and attributes, the limit is 32"):
        compile_expression("+".join(heads), set(heads))


def test_a_table_that_takes_too_much_of_a_requests_time_is_refused():
    slow = "sin(" * 90 + "save" + ")" * 90
    utilities = "\n".join(f'p{i} = "{slow}"' for i in range(16))
    weights = ", ".join(f"p{i} = 1.0" for i in range(16))
    home = f"[surfaces.home]\nweights = {{ {weights} }}\n[surfaces.home.utilities]\n{utilities}\n"
    content = (home + tiny.UTILITY[tiny.UTILITY.index("[surfaces.related]") :]).encode()
    loaded = load_utility(content, tiny.manifest())
    with pytest.raises(
        UtilityError, match=r"surface 'home': its utilities take .* ms for 5,000 candidates, the limit is 6 ms"
    ):
        check_time(loaded, 5_000)
    check_time(load_utility(tiny.UTILITY.encode(), tiny.manifest()), 5_000)


def test_a_constant_part_may_overflow():
    assert evaluate("where(save < exp(1000), save, 0)", P).tolist() == pytest.approx([0.5, 0.2])
