from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from model_store.model.utility import UtilityError, load_utility, stated_tunings
from ranker.tuning.inputs import logged_requests, utility_of
from ranker.tuning.results import TunedWeights
from ranker.tuning.thetas import parse_thetas
from ranker.tuning.tune import Goal, tune
from ranker.tuning.utility_file import tuned_table
from tests import tiny
from tests.ranker.tuning.logged import START_MS, join_answers, publish_tiny

COMMENTED = "# Ask the ranking team before a change.\n" + tiny.UTILITY.replace(
    "[surfaces.related]", "# From a pin.\n[surfaces.related]"
)
INLINE = """
surfaces.related = { weights = { pinner = 1 }, utilities = { pinner = "save" } }
[surfaces.home]
utilities = { creator = "save * pin.popularity", pinner = "save - hide" }
at_least = { pinner = -9.0 }
[surfaces.home.weights]
creator = 1
pinner = 1
"""


def written(folder: Path, table: str = COMMENTED, theta: str = "creator=+1%"):
    bundle = publish_tiny(folder, 1, {"utility.toml": table.encode()}).read("tiny", 1)
    data = logged_requests(join_answers(folder / "joined"), bundle, "home", ["tiny@1"])
    surface = utility_of(bundle, "home").surfaces["home"]
    goal = Goal("pinner", parse_thetas([theta]), surface.weights)
    tuned = tune(data.scored(utility_of(bundle, "home")), goal, 7, fronts=False)
    assert isinstance(tuned, TunedWeights)
    return tuned, tuned_table(table.encode(), bundle, data, goal, tuned), (bundle, data, goal)


@pytest.mark.parametrize("table", [COMMENTED, INLINE], ids=["tables", "inline"])
def test_the_table_holds_the_tuned_weights_and_thetas_and_all_else_stays(tmp_path, table):
    tuned, content, _ = written(tmp_path, table)
    loaded = load_utility(content, tiny.manifest())
    home = loaded.surfaces["home"]
    assert np.array_equal(home.weights, tuned.weights)
    assert home.at_least == tuned.thetas
    before, after = tomllib.loads(table), tomllib.loads(content.decode())
    assert after["surfaces"]["related"] == before["surfaces"]["related"]
    assert after["surfaces"]["home"]["utilities"] == before["surfaces"]["home"]["utilities"]


def test_comments_stay_and_new_ones_explain_the_numbers(tmp_path):
    tuned, content, _ = written(tmp_path)
    text = content.decode()
    assert text.startswith("# Ask the ranking team before a change.\n")
    assert "# From a pin.\n[surfaces.related]" in text
    creator = tuned.parties[1]
    assert f"one more unit costs {creator.multiplier:.4g} of pinner" in text
    assert f"creator: {creator.before.value:.4g} -> {creator.after.value:.4g} per request" in text


def test_tuning_again_replaces_what_was_stated_before(tmp_path):
    tuned, content, (bundle, data, goal) = written(tmp_path)
    assert tuned_table(content, bundle, data, goal, tuned) == content


def test_the_statement_says_how_the_weights_were_tuned(tmp_path):
    tuned, content, _ = written(tmp_path)
    stated = stated_tunings(content, load_utility(content, tiny.manifest()))
    assert stated.keys() == {"home"}
    home = stated["home"]
    assert (home.maximised, home.model, home.thetas) == ("pinner", "tiny@1", tuned.thetas)
    assert (home.requests, home.users) == (tuned.requests, tuned.users)
    assert (home.since_ms, home.until_ms) == (START_MS + 1_000, START_MS + 120_001)
    assert home.data.startswith("joined (")
    assert home.gap == pytest.approx(tuned.gap, rel=0.01)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("weights = { pinner = 1.0, creator", "weights = { pinner = 1.1, creator"),
        lambda text: text.replace('"save - 2 * hide"', '"save - 3 * hide"'),
        lambda text: text.replace("at_least = {creator = ", "at_least = {creator = 1"),
    ],
    ids=["weight", "expression", "theta"],
)
def test_a_statement_about_a_surface_that_was_edited_is_refused(tmp_path, edit):
    text = written(tmp_path)[1].decode()
    edited = edit(text)
    assert edited != text
    table = load_utility(edited.encode(), tiny.manifest())  # it can be served all the same
    with pytest.raises(UtilityError, match=r"surface 'home' was changed after \[tuning.home\] was written"):
        stated_tunings(edited.encode(), table)


def test_a_table_by_hand_states_nothing():
    content = tiny.UTILITY.encode()
    assert stated_tunings(content, load_utility(content, tiny.manifest())) == {}


def test_a_statement_about_an_unknown_surface_is_refused(tmp_path):
    content = written(tmp_path)[1].replace(b"[tuning.home]", b"[tuning.shop]")
    with pytest.raises(UtilityError, match="states the tuning of shop, but has no such surface"):
        load_utility(content, tiny.manifest())
