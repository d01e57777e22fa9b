from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_store.bundle.files import Bundle
from ranker.errors import SettingError
from ranker.tuning.constants import ConstantSearch, find_constants, search_constants, with_constants
from ranker.tuning.inputs import TuningData, utility_of
from ranker.tuning.results import Infeasible
from ranker.tuning.thetas import parse_thetas
from ranker.tuning.tune import Goal
from tests import tiny
from tests.ranker.tuning.logged import publish_tiny

GOAL = Goal("pinner", parse_thetas(["creator=+1%"]), np.array([1.0, 0.5]))


def bundle_with(folder: Path, pinner: str) -> Bundle:
    table = tiny.UTILITY.replace('"save - 2 * hide"', f'"{pinner}"', 1)
    return publish_tiny(folder, 1, {"utility.toml": table.encode()}).read("tiny", 1)


def replaced(folder: Path, pinner: str, free: str, value: float) -> str:
    surface = utility_of(bundle_with(folder, pinner), "home").surfaces["home"]
    (constant,) = find_constants([free], surface, GOAL)
    return with_constants(surface, {constant: value})["pinner"]


@pytest.mark.parametrize(
    ("pinner", "free", "expected"),
    [
        ("save - 2 * hide", "hide in [1,5]", "save - 3.5 * hide"),
        ("save - 2 * hide", "pinner: hide in [1, 5]", "save - 3.5 * hide"),
        ("save - hide * 2.0", "pinner: 2.0 in [1,5]", "save - hide * 3.5"),
        ("-2 * hide + 2.0 * save", "hide in [1,5]", "-3.5 * hide + 2.0 * save"),
        ("-2 * hide + 2.0 * save", "2.0 in [1,5]", "-2 * hide + 3.5 * save"),
        ("where(hide > 0.5, 0, save)", "0.5 in [0,1]", "where(hide > 3.5, 0, save)"),
        ("-2 * hide + 2.0 * save", "2 in [-5,5]", "-3.5 * hide + 2.0 * save"),
        ("(save  # saved\\n  - 2 * hide)", "hide in [1,5]", "(save  # saved\n  - 3.5 * hide)"),
        ("(save  # gemerkt\u00f6\\n  - 2 *\\n hide)", "2 in [1,5]", "(save  # gemerkt\u00f6\n  - 3.5 *\n hide)"),
        ("save + 3 * pin.popularity", "pin.popularity in [0,9]", "save + 3.5 * pin.popularity"),
    ],
)
def test_a_constant_is_named_by_what_it_multiplies_or_by_its_digits(tmp_path, pinner, free, expected):
    assert replaced(tmp_path, pinner, free, 3.5) == expected


def test_a_negative_constant_stays_one_number(tmp_path):
    assert replaced(tmp_path, "2 ** save - hide", "2 in [-5,5]", -3.0) == "(-3) ** save - hide"
    assert replaced(tmp_path / "other", "save - 2 * hide", "hide in [-5,5]", -3.0) == "save - (-3) * hide"


@pytest.mark.parametrize(
    ("pinner", "free", "message"),
    [
        ("save - 2 * hide", "save in [1,5]", "a constant multiplies save 0 times, not once"),
        (
            "2 * save - 2 * hide",
            "2 in [1,5]",
            "the number 2 is written 2 times, not once; name the constant by",
        ),
        ("2 * hide + 3 * hide", "hide in [1,5]", "a constant multiplies hide 2 times"),
        ("save - 2 * hide", "2.0 in [1,5]", "the number 2.0 is written 0 times"),
        ("save - 2 * hide", "hide in 1..5", 'write "NAME in \\[LOW, HIGH\\]"'),
        ("save - 2 * hide", "hide in [5,1]", "the first below the second"),
        ("save - 2 * hide", "hide in [0,inf]", "must be finite"),
        ("save - 2 * hide", "hide in [1,1e300]", "within 1e\\+09 of 0"),
        ("save - 2 * hide", "hide in [nan,5]", "must be finite"),
        ("save - 2 * hide", "hide in [a,b]", "the bounds must be numbers"),
        ("save - 2 * hide", "ad: hide in [1,5]", "there is no party 'ad'; the parties are pinner, creator"),
        ("save - 2 * hide", "creator: save in [1,5]", "creator has a theta, which would mean something else"),
    ],
)
def test_a_constant_that_cannot_be_searched_is_named(tmp_path, pinner, free, message):
    with pytest.raises(SettingError, match=message):
        replaced(tmp_path, pinner, free, 1)


def test_a_constant_is_not_searched_twice(tmp_path):
    surface = utility_of(bundle_with(tmp_path, "save - 2 * hide"), "home").surfaces["home"]
    with pytest.raises(SettingError, match="this constant is searched already"):
        find_constants(["hide in [1,5]", "2 in [1,4]"], surface, GOAL)


def requests_with_a_shy_head(seed: int = 0, requests: int = 800) -> TuningData:
    """Return requests whose head `hide` says a quarter of the truth, so that it should count four times as much."""
    rng = np.random.default_rng(seed)
    rows = 10 * requests
    save, hide = rng.beta(2, 4, rows), rng.beta(1, 3, rows)
    labels = np.stack([rng.random(rows) < save, rng.random(rows) < hide], axis=1).astype(np.float32)
    return TuningData(
        name="shy", surface="home", since_ms=0, until_ms=1, users=np.arange(requests) // 2,
        row_splits=np.arange(requests + 1) * 10, probabilities=np.stack([save, hide / 4], axis=1).astype(np.float32),
        attributes={"pin.popularity": rng.random(rows)}, labels=labels, examined=np.ones(rows),
    )  # fmt: skip


def searched(folder: Path, free: str, *thetas: str, trials: int = 25) -> ConstantSearch | Infeasible:
    bundle = bundle_with(folder, "save - 2 * hide")
    goal = Goal("pinner", parse_thetas(thetas), np.array([1.0, 0.5]))
    constants = find_constants([free], utility_of(bundle, "home").surfaces["home"], goal)
    return search_constants(requests_with_a_shy_head(), bundle, goal, constants, 7, trials, 0.3)


def test_the_search_finds_that_a_shy_head_should_count_more(tmp_path):
    found = searched(tmp_path, "hide in [0.5,16]", "creator=+1%")
    assert isinstance(found, ConstantSearch)
    before, best = found.values["pinner: hide"]
    assert before == 2
    assert 5 < best < 14
    assert f"save - {best:g} * hide" in found.content.decode()
    assert found.held_out is not None
    old, new, difference = found.held_out
    assert new.value > old.value
    assert difference.low > 0


def test_equal_seeds_find_equal_constants(tmp_path):
    first, again = (searched(tmp_path / name, "hide in [0.5,16]", "creator=+1%", trials=5) for name in ("a", "b"))
    assert first == again


def test_the_constant_in_force_stays_if_no_trial_is_better(tmp_path):
    found = searched(tmp_path, "hide in [0.001,0.002]", "creator=+1%", trials=3)
    assert isinstance(found, ConstantSearch)
    assert found.values == {"pinner: hide": (2.0, 2.0)}


def test_thetas_that_no_order_meets_end_the_search(tmp_path):
    assert isinstance(searched(tmp_path, "hide in [1,5]", "creator=+900%"), Infeasible)
