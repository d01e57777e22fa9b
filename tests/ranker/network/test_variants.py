from __future__ import annotations

import pytest

from ranker.errors import SettingError
from ranker.network.model import NetworkConfig
from ranker.network.variants import VARIANTS, network_overrides, parse_sizes


def network(variant: str) -> NetworkConfig:
    return NetworkConfig(heads=1, actions=4, surfaces=2, scalars=4, **network_overrides(variant))


def test_the_table_has_the_rankers_that_are_compared() -> None:
    fusions = {name: network(name).fusion for name in VARIANTS}
    assert fusions == {
        "base": "none", "wide": "none", "late": "late", "cross": "cross", "early": "early", "published": "early",
    }  # fmt: skip
    assert network("wide").widen == 2 * network("base").widen


def test_the_published_size_is_that_of_the_paper() -> None:
    sizes = network("published")
    assert (sizes.encoder_layers, sizes.readout_rows) == (2, 10)
    assert sizes.action_dim + 2 * sizes.token_pin_dim == 96


def test_a_bundle_that_does_not_name_newer_sizes_keeps_the_network_that_it_was_made_with() -> None:
    older = NetworkConfig(heads=1, actions=4, surfaces=2, scalars=4)
    assert (older.pieces, older.cross_rank, older.read_once) == (0, 0, False)


def test_a_variant_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        SettingError, match="unknown variant 'huge'; choose one of base, wide, late, cross, early, published"
    ):
        network_overrides("huge")


def test_sizes_take_the_type_of_their_field() -> None:
    assert parse_sizes(["encoder_layers=1", "hidden=256,128", "dropout=0.25"]) == {
        "encoder_layers": 1, "hidden": (256, 128), "dropout": 0.25,
    }  # fmt: skip
    assert parse_sizes(["hidden=32"]) == {"hidden": (32,)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "layers=2",
            "--size layers=2: unknown size 'layers'; write NAME=VALUE with one of pieces, pieces_dim, crossed_dim",
        ),
        ("heads=2", "unknown size 'heads'"),
        ("encoder_layers", "encoder_layers must be a whole number, but is ''"),
        ("encoder_layers=0", "encoder_layers must be at least 1"),
        ("token_pin_dim=1.5", "token_pin_dim must be a whole number, but is '1.5'"),
        ("hidden=64,", "hidden must be a whole number, but is ''"),
        ("dropout=1", "dropout must be at least 0 and below 1, but is '1'"),
        ("dropout=much", "dropout must be at least 0 and below 1, but is 'much'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(setting: str, message: str) -> None:
    with pytest.raises(SettingError) as refused:
        parse_sizes([setting])
    assert message in str(refused.value)
