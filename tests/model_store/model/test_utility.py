from __future__ import annotations

import numpy as np
import pytest

from model_store.model.utility import UtilityError, load_utility
from tests import tiny


def table(expression, surface="home"):
    return tiny.UTILITY.replace('"save - 2 * hide"', f'"{expression}"').encode()


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


def test_weights_combine_the_parties():
    loaded = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    assert loaded.combine("home", np.array([[1.0, 2.0], [0.0, -4.0]])).tolist() == [2.0, -2.0]


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
        ("9" * 400, "is too large"),
        ("(" * 300 + "save" + ")" * 300, "pinner"),
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
        (b"a = " + b"[" * 100_000, "not TOML"),
        (b"[surfaces.home]\nweights = {}\n", "surfaces.home.utilities: Field required"),
        (tiny.UTILITY.replace("pinner = 1.0, creator", "creator").encode(), "weights are for ['creator']"),
        (tiny.UTILITY.replace("surfaces.related", "surfaces.shop").encode(), "surfaces ['home', 'shop']"),
        (tiny.UTILITY.replace("1.0", "nan").encode(), "finite number"),
        (tiny.UTILITY.replace("[surfaces.home]", "[surfaces.home]\nextra = 1").encode(), "surfaces.home.extra"),
    ],
)
def test_bad_table_is_a_named_error(content, message):
    with pytest.raises(UtilityError) as raised:
        load_utility(content, tiny.manifest())
    assert message in str(raised.value)
