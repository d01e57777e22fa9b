"""What a utility table says about how its weights were tuned."""

from __future__ import annotations

import pytest

from model_store.model.utility import UtilityError, fingerprint, load_surface, load_utility, stated_tunings
from tests import tiny

THETA = tiny.UTILITY.replace("creator = 0.5 }", "creator = 0.5 }\nat_least = { creator = 0.25 }")
STATED = """
[tuning.home]
maximised = "pinner"
model = "tiny@1"
data = "joined"
since_ms = 1
until_ms = 9
requests = 8
users = 3
gap = 1e-7
fingerprint = "{}"
"""


def table(content):
    return load_utility(content.encode(), tiny.manifest())


def stating(content, of=None):
    return content + STATED.format(fingerprint(table(of or content).surfaces["home"]))


def test_a_fingerprint_is_the_same_for_ever():
    # Tables in model stores hold it.
    found = {name: fingerprint(surface) for name, surface in table(tiny.UTILITY).surfaces.items()}
    assert found == {"home": "7faf2a28176302c0", "related": "aad0862381d334f1"}


def test_a_statement_holds_for_the_surface_that_was_tuned():
    home = stated_tunings(stating(THETA).encode(), table(THETA))["home"]
    assert (home.maximised, home.requests, home.users, home.gap) == ("pinner", 8, 3, 1e-7)
    assert home.thetas == {"creator": 0.25}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("at_least = { creator = 0.25 }", "at_least = { creator = 0.3 }"),
        ("at_least = { creator = 0.25 }", "at_least = { pinner = 0.25 }"),
        ("creator = 0.5 }", "creator = 0.6 }"),
        ("2 * hide", "3 * hide"),
    ],
)
def test_a_surface_that_was_changed_afterwards_is_refused(before, after):
    changed = THETA.replace(before, after)
    assert changed != THETA
    with pytest.raises(UtilityError, match=r"surface 'home' was changed after \[tuning.home\] was written"):
        stated_tunings(stating(changed, of=THETA).encode(), table(changed))


def test_a_statement_about_a_surface_that_is_not_there_is_refused():
    with pytest.raises(UtilityError, match="states the tuning of shop, but has no such surface"):
        table(stating(THETA).replace("[tuning.home]", "[tuning.shop]"))


def test_one_surface_of_a_table_compiles_without_a_model():
    names = {"save", "hide", "pin.popularity"}
    assert load_surface(THETA.encode(), "home", names).parties == ("pinner", "creator")
    with pytest.raises(UtilityError, match=r"has surfaces \['home', 'related'\], but not 'shop'"):
        load_surface(THETA.encode(), "shop", names)
