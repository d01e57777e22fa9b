"""The rankers worth comparing, by name, and the sizes that a command line may change. Imports no PyTorch."""

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
    """A ranker: how the user's last actions meet the candidate, and what else differs from the default network."""

    description: str
    fusion: Literal["none", "late", "early", "cross"]
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "base": Variant("no sequence", "none"),
        "wide": Variant("no sequence, layers twice as wide", "none", MappingProxyType({"widen": 2})),
        "late": Variant("the sequence is encoded without the candidate", "late"),
        "early": Variant("the candidate stands in every token of the sequence", "early"),
        "cross": Variant("the candidate attends to the sequence, encoded once", "cross"),
    }
)

#: No network of this kind gains from more, and a typing mistake should not ask for a terabyte.
_COUNT_MAX = 8_192

#: What the data or the variant decides.
_DECIDED = frozenset({"heads", "actions", "surfaces", "scalars", "dim", "fusion", "sequence"})


def network_overrides(name: str) -> dict[str, Any]:
    """Return what a variant changes in `NetworkConfig`.

    Raises:
        SettingError: there is no such variant.
    """
    if name not in VARIANTS:
        raise SettingError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    return {"fusion": variant.fusion, **variant.overrides}


def parse_sizes(settings: Iterable[str]) -> dict[str, Any]:
    """Read `NAME=VALUE` settings of `NetworkConfig`'s fields; several numbers of one field are separated by commas.

    Raises:
        SettingError: no such field, or no such value for it; the message lists what there is.
    """
    from ranker.network.model import NetworkConfig  # noqa: PLC0415 - imports PyTorch

    kinds = get_type_hints(NetworkConfig)
    names = [f.name for f in dataclasses.fields(NetworkConfig) if f.name not in _DECIDED]
    sizes: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise SettingError(f"--size {setting}: no size {name!r}; write NAME=VALUE with one of {', '.join(names)}")
        if name in sizes:
            raise SettingError(f"--size {setting}: {name} has a value already; give each size one")
        try:
            sizes[name] = _value(name, text, kinds[name])
        except ValueError as error:
            raise SettingError(f"--size {setting}: {error}") from None
    return sizes


def _value(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text not in {"true", "false"}:
            raise ValueError(f"{name} is true or false")
        return text == "true"
    if kind is float:
        return _share(name, text)
    if kind is int:
        return _count(name, text)
    return tuple(_count(name, part) for part in text.split(","))


def _count(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} takes whole numbers, got {text!r}")
    # A network may do without a readout map; nothing else can be left out by its size.
    if (value := int(text)) < 1 and name != "readout_dim":
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
        raise ValueError(f"{name} is a share from 0 to below 1, got {text!r}")
    return value
