from __future__ import annotations

import numpy as np
import pytest

from feature_client.bulk.coverage import coverage
from feature_client.codec import encode_rows
from feature_client.stores.memory_store import MemoryStore
from model_store.bundle.files import read_bundle
from model_store.bundle.manifest import Calibration, Head, Surface
from model_store.bundle.stability import stability_index
from model_store.bundle.statistics import Distribution, Statistics, make_statistics, observed
from model_store.bundle.tensor_sources import QueryVector, TensorInput
from model_store.model.compatibility import Effect, breaks_callers, compare
from tests import tiny

SPACE_2 = tiny.changed(tiny.SPACE, version=2)
PINS_2 = tiny.changed(
    tiny.PINS, version=2, fields=(tiny.changed(tiny.PINS.fields[0], space=SPACE_2), *tiny.PINS.fields[1:])
)
NO_TRENDS = tuple(i for i in tiny.INPUTS if not isinstance(i.source, QueryVector))


def bundle(tmp_path, version, **changes):
    tiny.write_tiny_bundle(tmp_path / str(version), version, **changes)
    return read_bundle(tmp_path / str(version))


@pytest.mark.parametrize(
    ("changes", "effect", "field", "text"),
    [
        ({"surfaces": (Surface(name="home"), Surface(name="related", query=True), Surface(name="shop")),
          "utility.toml": (tiny.UTILITY + '[surfaces.shop]\nweights={pinner=1.0}\nutilities={pinner="save"}').encode()},
         Effect.NOTE, "surfaces.shop", "expected none, found ranked"),
        ({"surfaces": (Surface(name="home", query=True), Surface(name="related", query=True))},
         Effect.CALLERS, "surfaces.home.query", "make callers send a query first"),
        ({"heads": (Head(name="save", meaning="clicked", calibration=Calibration(slope=0.5, intercept=-0.1)),
                    Head(name="hide", meaning="hid"))},
         Effect.CALLERS, "heads.save.meaning", "expected 'saved', found 'clicked'; give the head with the new meaning"),
        ({"heads": (Head(name="save", meaning="saved"), Head(name="hide", meaning="hid"))},
         Effect.NOTE, "heads.save.calibration", "0.5000 x + -0.1000"),
        ({"groups": (PINS_2, tiny.USERS)},
         Effect.FEATURES, "groups.pin_core", "load pin_core@2 first (pinrank features load)"),
        ({"groups": (PINS_2, tiny.USERS)},
         Effect.NOTE, "groups.pin_core.embedding", "tiny@1 (float16[4]), found tiny@2 (float16[4])"),
        ({"groups": (PINS_2, tiny.USERS)}, Effect.CALLERS, "inputs.query.space", "callers that send embeddings"),
        ({"groups": (tiny.changed(tiny.PINS, fields=PINS_2.fields), tiny.USERS)},
         Effect.FEATURES, "groups.pin_core", "give it a new version number (pin_core@2)"),
        ({"sequence": tiny.changed(tiny.ACTIONS, actions=("save",))},
         Effect.CALLERS, "sequence.actions", "Record calls with hide would be refused"),
        ({"sequence": tiny.changed(tiny.ACTIONS, actions=("save", "hide", "like"))},
         Effect.FEATURES, "sequence", "give it a new version number (actions@2)"),
        ({"golden_tolerance": 0.01}, Effect.NOTE, "golden_tolerance", "expected 0.001, found 0.01"),
        ({"utility.toml": tiny.UTILITY.replace("2 * hide", "3 * hide").encode()},
         Effect.NOTE, "utility.toml: home.pinner", "expected save - 2 * hide, found save - 3 * hide"),
        ({"utility.toml": tiny.UTILITY.replace("creator = 0.5", "creator = 0.7").encode()},
         Effect.NOTE, "utility.toml: home", "creator x 0.5, found pinner x 1, creator x 0.7"),
        ({"utility.toml": b"broken"}, Effect.CALLERS, "utility.toml", "correct the table"),
        ({}, Effect.NOTE, "lineage.seed", "expected 1, found 2"),
    ],
)  # fmt: skip
def test_a_difference_names_its_field_what_was_expected_what_was_found_and_the_fix(
    tmp_path, changes, effect, field, text
):
    found = compare(bundle(tmp_path, 1), bundle(tmp_path, 2, **changes))
    own = [finding for finding in found if finding.field == field and finding.effect is effect]
    assert own, [str(finding) for finding in found]
    assert text in str(own[0])
    effects = [finding.effect for finding in found]
    assert effects == sorted(effects, key=list(Effect).index)


def test_gone_surfaces_and_heads_break_callers():
    one = tiny.manifest()
    other = one.model_copy(update={"surfaces": one.surfaces[:1], "heads": one.heads[:1]})
    assert [finding.field for finding in breaks_callers(one, other)] == ["surfaces.related", "heads.hide"]
    assert breaks_callers(one, one) == []
    reordered = one.model_copy(update={"heads": one.heads[::-1]})
    assert breaks_callers(one, reordered) == []


def test_the_same_bundle_differs_in_nothing(tmp_path):
    one = bundle(tmp_path, 1)
    assert compare(one, one) == []


async def test_coverage_counts_what_the_store_really_holds():
    store = MemoryStore()
    await store.start()
    await store.multi_put(tiny.features(users=4, pins=50).items())
    needs = tiny.manifest().needs
    assert [(c.ref, c.share, c.enough) for c in await coverage(store, needs)] == [
        ("user_core@1", 1.0, True), ("pin_core@1", 1.0, True), ("actions@1", 1.0, True),
    ]  # fmt: skip
    moved = tiny.manifest().model_copy(update={"groups": (PINS_2, tiny.USERS)}).needs
    before = {c.ref: c for c in await coverage(store, moved)}["pin_core@2"]
    assert (before.entities, before.present, before.enough) == (50, 0, False)
    half = np.arange(1, 26, dtype=np.uint64)
    await store.multi_put(zip(PINS_2.keys(half), encode_rows(PINS_2, tiny.pin_rows(half)), strict=True))
    during = {c.ref: c for c in await coverage(store, moved)}["pin_core@2"]
    assert (during.entities, during.present) == (50, 25)
    assert "pin_core@2: 50.0% of 50 sampled entities have it" in str(during)
    other = tiny.changed(PINS_2, fields=PINS_2.fields[:2])
    foreign = tiny.manifest().model_copy(update={"groups": (other,)}).needs
    assert (await coverage(store, foreign))[0].foreign == 25
    await store.close()


def test_inputs_without_a_query_are_compared_too(tmp_path):
    plain = tiny.manifest().model_copy(
        update={"inputs": NO_TRENDS, "surfaces": (Surface(name="home"), Surface(name="related"))}
    )
    assert "inputs.query.space" in {finding.field for finding in breaks_callers(tiny.manifest(), plain)}
    assert isinstance(NO_TRENDS[0], TensorInput)


def test_statistics_tell_a_moved_distribution_from_one_that_stayed():
    rng = np.random.default_rng(0)
    trained = Distribution.of(rng.normal(size=20_000))
    shares = np.array(trained.shares)
    np.testing.assert_allclose(shares, 0.1, atol=0.01)
    assert stability_index(shares, trained.counts(rng.normal(size=5_000))) < 0.02
    assert stability_index(shares, trained.counts(rng.normal(1.0, size=5_000))) > 0.25
    assert stability_index(shares, trained.counts(np.full(100, 50.0))) > 5


def test_statistics_of_a_constant_and_of_few_values_have_parts():
    constant = Distribution.of(np.zeros(100))
    assert (constant.counts(np.zeros(7)).sum(), constant.counts(np.ones(7)).sum()) == (7, 7)
    flags = Distribution.of(np.array([0, 1] * 50))
    assert stability_index(np.array(flags.shares), flags.counts(np.ones(50))) > 0.25
    with pytest.raises(ValueError, match="edges must ascend"):
        Distribution(edges=(2, 1), shares=(0.1, 0.1, 0.8), low=0, high=1, mean=0)


def test_statistics_name_scalars_the_sequence_and_heads(tmp_path):
    from model_store.model.assembly import Assembler

    manifest = tiny.manifest()
    batch = Assembler(manifest).assemble(tiny.fetched([1, 2, 3], [4, 5]), "home")
    made = make_statistics(manifest, batch, np.full((3, 2), 0.5, np.float32))
    assert set(made.inputs) == {"pin_core.popularity", "sequence.length"}
    assert set(made.heads) == {"save", "hide"}
    assert observed(manifest, batch)["sequence.length"].tolist() == [2]
    assert Statistics.model_validate_json(made.model_dump_json()) == made
    first = made.model_copy(update={"inputs": {"pin_core.popularity": Distribution.of(np.arange(10))}})
    bundles = [
        bundle(tmp_path, v, **{"statistics.json": s.model_dump_json().encode()}) for v, s in ((1, made), (2, first))
    ]
    assert any(finding.field == "ranges.pin_core.popularity" for finding in compare(*bundles))
