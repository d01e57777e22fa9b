"""What `explore.toml` may say, and what is refused by name."""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path

import numpy as np
import pytest

from model_store.bundle.files import BundleError, read_bundle
from model_store.exploration.differences import exploration_findings
from model_store.exploration.orders import OrderExplorer
from model_store.exploration.table import ExplorationError, load_exploration, read_exploration
from model_store.exploration.weights import WeightsExplorer
from model_store.model.compatibility import Effect
from model_store.model.utility import load_utility
from tests import tiny

TABLE = """
seed = 7
[surfaces.home]
kind = "weights"
share = 0.25
regret_max = 0.05
[surfaces.home.arms.more]
weights = { creator = 0.75 }
[surfaces.home.arms.other]
weights = { pinner = 0.5, creator = 0.0 }
[surfaces.related]
kind = "order"
share = 0.125
regret_max = 0.1
best = 6
temperature = 0.5
floor = 0.25
"""


def loaded(text):
    manifest = tiny.manifest()
    return load_exploration(text.encode(), manifest, load_utility(tiny.UTILITY.encode(), manifest))


def test_a_table_becomes_one_explorer_for_each_surface():
    found = loaded(TABLE)
    assert (found.seed, found.digest) == (7, hashlib.sha256(TABLE.encode()).hexdigest())
    home, related = found.surfaces["home"], found.surfaces["related"]
    assert isinstance(home, WeightsExplorer)
    assert (home.share, home.regret_max, home.arms) == (0.25, 0.05, ("more", "other"))
    assert home.weights.tolist() == [[1.0, 0.75], [0.5, 0.0]]  # the pinner's weight of `more` stays as tuned
    assert home.probabilities.tolist() == [0.5, 0.5]
    assert isinstance(related, OrderExplorer)
    assert (related.best, related.temperature, related.floor) == (6, 0.5, 0.25)
    assert related.arms == ("best-2", "best-3", "best-4", "best-5", "best-6")


def test_a_surface_that_is_not_named_does_not_explore():
    assert loaded(TABLE[: TABLE.index("[surfaces.related]")]).surfaces.keys() == {"home"}


def test_arms_may_state_their_probabilities():
    text = TABLE.replace("0.75 }", "0.75 }\nprobability = 0.9").replace("0.0 }", "0.0 }\nprobability = 0.1")
    np.testing.assert_allclose(loaded(text).surfaces["home"].probabilities, [0.9, 0.1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed = 7", "seed = "), "explore.toml: the exploration table is not TOML: "),
        (("seed = 7", "seed = -1"), "seed: Input should be greater than or equal to 0"),
        (("seed = 7", "seed = true"), "seed: Input should be a valid integer"),
        (("seed = 7\n", ""), "seed: Field required"),
        (("surfaces.related", "surfaces.shop"), "explore.toml: surfaces.shop: model tiny@1 ranks home, related; name"),
        (("creator = 0.75", "ad = 1.0"),
         "surfaces.home.arms.more.weights: 'ad' is no party of this surface; its utility table has pinner, creator"),
        (("creator = 0.75", "creator = inf"), "surfaces.home.arms.more.weights.creator: Input should be a finite"),
        (("creator = 0.75", "creator = nan"), "surfaces.home.arms.more.weights.creator: Input should be a finite"),
        (("{ creator = 0.75 }", "{}"), "surfaces.home.arms.more.weights: Dictionary should have at least 1"),
        (("share = 0.25", "share = 0"), "surfaces.home.share: Input should be greater than 0"),
        (("share = 0.25", "share = true"), "surfaces.home.share: Input should be a valid number"),
        (("share = 0.25", 'share = "0.25"'), "surfaces.home.share: Input should be a valid number"),
        (("share = 0.25", "share = 1.01"), "surfaces.home.share: Input should be less than or equal to 1"),
        (("share = 0.25", "share = nan"), "surfaces.home.share: Input should be less than or equal to 1"),
        (("regret_max = 0.05", "regret_max = 0"), "surfaces.home.regret_max: Input should be greater than 0"),
        (("regret_max = 0.05", "regret = 0.05"), "surfaces.home.regret: Extra inputs are not permitted"),
        (("best = 6", "best = 9"), "surfaces.related.best: Input should be less than or equal to 8"),
        (("best = 6", "best = 1"), "surfaces.related.best: Input should be greater than or equal to 2"),
        (("temperature = 0.5", "temperature = 0"), "surfaces.related.temperature: Input should be greater than or"),
        (("temperature = 0.5", "temperature = inf"), "surfaces.related.temperature: Input should be a finite number"),
        (("floor = 0.25", "floor = 1"), "surfaces.related.floor: Input should be less than 1"),
        (("floor = 0.25", "floor = -0.1"), "surfaces.related.floor: Input should be greater than or equal to 0"),
        (('kind = "order"', 'kind = "dice"'), "surfaces.related: Input tag 'dice' found using 'kind' does not match"),
        (("0.75 }", "0.75 }\nprobability = 0.5"),
         "surfaces.home.arms.other has no probability, but more has; state one for each arm, or for none"),
        (("0.75 }", "0.75 }\nprobability = 0"), "surfaces.home.arms.more.probability: Input should be greater than 0"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_by_name(change, message):
    assert change[0] in TABLE
    with pytest.raises(ExplorationError) as raised:
        loaded(TABLE.replace(*change))
    assert message in str(raised.value)
    assert str(raised.value).startswith("explore.toml: ")


def test_probabilities_that_do_not_sum_to_1_are_refused():
    text = TABLE.replace("0.75 }", "0.75 }\nprobability = 0.5").replace("0.0 }", "0.0 }\nprobability = 0.4")
    with pytest.raises(ExplorationError, match=r"surfaces\.home\.arms: the probabilities sum to 0\.9; make them sum"):
        loaded(text)


@pytest.mark.parametrize("count", [0, 33])
def test_a_surface_has_1_to_32_arms(count):
    start = TABLE[: TABLE.index("[surfaces.home.arms")]
    arms = "".join(f"[surfaces.home.arms.a{i}]\nweights = {{ creator = {i}.0 }}\n" for i in range(count))
    with pytest.raises(
        ExplorationError, match="surfaces.home.arms: (Field required|Dictionary should have at most 32)"
    ):
        loaded(start + arms)


def test_a_table_of_no_text_or_no_surface_is_refused():
    for content, message in ((b"\xff", "not TOML"), (b"seed = 1\n[surfaces]", "surfaces: Dictionary should have at")):
        with pytest.raises(BundleError, match=message):
            load_exploration(content, tiny.manifest(), load_utility(tiny.UTILITY.encode(), tiny.manifest()))


def bundle(tmp_path, version, **files):
    tiny.write_tiny_bundle(tmp_path / str(version), version, **files)
    return read_bundle(tmp_path / str(version))


def test_a_bundle_without_a_table_does_not_explore(tmp_path):
    plain = bundle(tmp_path, 1)
    assert read_exploration(plain, load_utility(tiny.UTILITY.encode(), plain.manifest)) is None


def test_two_versions_differ_by_each_changed_field(tmp_path):
    old = bundle(tmp_path, 1, **{"explore.toml": TABLE.encode()})
    new = bundle(tmp_path, 2, **{"explore.toml": TABLE.replace("0.75", "0.8").replace("best = 6", "best = 5").encode()})
    found = [(f.field, f.expected, f.found, f.effect) for f in exploration_findings(old, new)]
    assert found == [
        ("explore.toml: surfaces.home.arms.more.weights.creator", "0.75", "0.8", Effect.NOTE),
        ("explore.toml: surfaces.related.best", "6", "5", Effect.NOTE),
    ]
    assert list(exploration_findings(old, old)) == []
    added = [f for f in exploration_findings(bundle(tmp_path, 3), old) if f.field == "explore.toml: seed"]
    assert [(f.expected, f.found) for f in added] == [("none", "7")]


def test_a_table_that_no_server_takes_is_a_finding(tmp_path):
    old, new = bundle(tmp_path, 1), bundle(tmp_path, 2, **{"explore.toml": b"seed = "})
    (finding,) = exploration_findings(old, new)
    assert (finding.field, finding.effect) == ("explore.toml", Effect.CALLERS)
    assert "is not TOML" in finding.found


def test_the_table_that_the_page_shows_is_a_valid_one():
    page = (Path(__file__).parents[3] / "docs/exploration.md").read_text()
    shown = textwrap.dedent(page[page.index("   ```toml\n") :].split("```")[1].removeprefix("toml\n"))
    assert loaded(shown).surfaces["home"].arms == ("more_creator", "less_creator")
