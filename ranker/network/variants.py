"""The named variants of the ranker, and the sizes that the command line may change. Does not import PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from ranker.errors import SettingError


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant: how the network combines the last actions with the candidate, and other changes to the defaults.

    Attributes:
        description: for the help.
        fusion: of `NetworkConfig`.
        sequence_length: how many of the last actions it reads, unless a training says otherwise.
        overrides: fields of `NetworkConfig`.
    """

    description: str
    fusion: Literal["none", "late", "early", "cross"]
    sequence_length: int = 0
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_SMALL = MappingProxyType(
    {"encoder_layers": 1, "action_dim": 16, "token_pin_dim": 16, "readout_rows": 4, "readout_dim": 32}
)

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "base": Variant("no sequence", "none"),
        "wide": Variant("no sequence, layers twice as wide", "none", 0, MappingProxyType({"widen": 2})),
        "late": Variant(
            "the sequence is encoded once, without the candidate",
            "late",
            50,
            MappingProxyType({"encoder_layers": 1, "read_once": True, "readout_dim": 32}),
        ),
        "cross": Variant("the candidate attends to the sequence", "cross", 50, MappingProxyType({"encoder_layers": 1})),
        "early": Variant("every token of the sequence contains the candidate", "early", 50, _SMALL),
        "published": Variant(
            "early fusion of the published size: two layers, twice as wide, 100 actions", "early", 100
        ),
    }
)

#: No network of this kind benefits from a larger size, and a typing error should not allocate a terabyte.
_COUNT_MAX = 8_192

#: Fields that the data or the variant determines.
_DECIDED = frozenset(
    {
        *("heads", "actions", "surfaces", "scalars", "pin_features", "user_features", "recency", "similarities", "dim"),
        *("interests", "user_vector", "fusion", "sequence"),
    }
)

#: Sizes of which 0 means none, or no limit.
_MAY_BE_ZERO = frozenset({"readout_dim", "pieces", "cross_rank", "crossed_dim"})

#: Of every variant. Bundles that were made before do not name these sizes, so their defaults are 0.
_EVERY = MappingProxyType({"pieces": 4, "cross_rank": 32})


def network_overrides(name: str) -> dict[str, Any]:
    """Return the fields of `NetworkConfig` that a variant changes. Raises SettingError for an unknown variant."""
    variant = _variant(name)
    return {"fusion": variant.fusion, **_EVERY, **variant.overrides}


def sequence_length(name: str) -> int:
    """Return how many of the last actions a variant reads. Raises SettingError for an unknown variant."""
    return _variant(name).sequence_length


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise SettingError(f"unknown variant {name!r}; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def parse_sizes(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `NAME=VALUE` settings of `NetworkConfig` fields; commas separate several numbers of one field.

    Raises:
        SettingError: a field is unknown, or its value is invalid; the message lists the choices.
    """
    from ranker.network.model import NetworkConfig  # noqa: PLC0415 - imports PyTorch

    kinds = get_type_hints(NetworkConfig)
    names = [f.name for f in dataclasses.fields(NetworkConfig) if f.name not in _DECIDED]
    sizes: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise SettingError(
                f"--size {setting}: unknown size {name!r}; write NAME=VALUE with one of {', '.join(names)}"
            )
        if name in sizes:
            raise SettingError(f"--size {setting}: {name} already has a value; set each size once")
        try:
            sizes[name] = _value(name, text, kinds[name])
        except ValueError as error:
            raise SettingError(f"--size {setting}: {error}") from None
    return sizes


def _value(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text not in {"true", "false"}:
            raise ValueError(f"{name} must be true or false")
        return text == "true"
    if kind is float:
        return _share(name, text)
    if kind is int:
        return _count(name, text)
    return tuple(_count(name, part) for part in text.split(","))


def _count(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} must be a whole number, but is {text!r}")
    if (value := int(text)) < 1 and name not in _MAY_BE_ZERO:
        raise ValueError(f"{name} must be at least 1")
    if value > _COUNT_MAX:
        raise ValueError(f"{name} can be at most {_COUNT_MAX:,}")
    return value


def _share(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, but is {text!r}")
    return value
