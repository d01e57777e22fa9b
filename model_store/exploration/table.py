"""The exploration table of a bundle (`explore.toml`): for each surface that explores, how.

seed = 7
[surfaces.home]
kind = "weights"      # a share of the requests follows other weights
share = 0.0125
regret_max = 0.05
[surfaces.home.arms.more_creator]
weights = { creator = 0.6 }    # parties that are not named keep the tuned weight
[surfaces.related]
kind = "order"        # a share of the requests gets its best candidates in a drawn order
share = 0.0125
regret_max = 0.05
best = 6
temperature = 0.1
floor = 0.05
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feature_client.groups import Name
from model_store.bundle.files import EXPLORATION, Bundle, BundleError
from model_store.bundle.manifest import Manifest
from model_store.exploration.explorer import Explorer
from model_store.exploration.orders import BEST_MAX, OrderExplorer
from model_store.exploration.weights import WeightsExplorer
from model_store.model.utility import TABLE_BYTES_MAX, SurfaceUtility, UtilityTable

#: So far may the arms' probabilities be from 1 in sum: decimal fractions are rarely exact.
_SUM_TOLERANCE = 1e-9


class ExplorationError(BundleError):
    """An exploration table is invalid. The message names the surface, the arm, the field, and what to do."""


class _Arm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    weights: Annotated[dict[Name, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
    probability: Annotated[float, Field(gt=0, le=1)] | None = None


class _Surface(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    share: Annotated[float, Field(gt=0, le=1)]
    regret_max: Annotated[float, Field(gt=0, le=1)]


class _WeightsSurface(_Surface):
    kind: Literal["weights"]
    arms: Annotated[dict[Name, _Arm], Field(min_length=1, max_length=32)]


class _OrderSurface(_Surface):
    kind: Literal["order"]
    best: Annotated[int, Field(ge=2, le=BEST_MAX)]
    temperature: Annotated[float, Field(ge=1e-9, allow_inf_nan=False)]  # float32 utilities over it are finite
    floor: Annotated[float, Field(ge=0, lt=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    surfaces: Annotated[
        dict[Name, Annotated[_WeightsSurface | _OrderSurface, Field(discriminator="kind")]], Field(min_length=1)
    ]


@dataclass(frozen=True, slots=True)
class Exploration:
    """A bundle's exploration.

    Attributes:
        digest: the SHA-256 digest of the table's text.
        seed: all draws follow from it and the request's id.
        surfaces: the explorers by surface; a surface without one does not explore.
    """

    digest: str
    seed: int
    surfaces: Mapping[str, Explorer]


def read_exploration(bundle: Bundle, utility: UtilityTable) -> Exploration | None:
    """Return the exploration of a bundle, or None if it has none.

    Args:
        bundle: a verified bundle.
        utility: the utility table in force, whose weights are the tuned ones.

    Raises:
        ExplorationError: see `load_exploration`.
    """
    content = bundle.files.get(EXPLORATION)
    return None if content is None else load_exploration(content, bundle.manifest, utility)


def load_exploration(content: bytes, manifest: Manifest, utility: UtilityTable) -> Exploration:
    """Parse and check an exploration table for a model.

    Args:
        content: the text of the table.
        manifest: the model's manifest.
        utility: the utility table in force, whose weights are the tuned ones.

    Raises:
        ExplorationError: it is not TOML; a field is unknown, missing or out of its range; the model does not rank a
            surface; an arm weighs an unknown party; probabilities do not sum to 1.
    """
    if len(content) > TABLE_BYTES_MAX:
        raise ExplorationError(
            f"{EXPLORATION}: the exploration table has {len(content):,} bytes, the limit is {TABLE_BYTES_MAX:,}"
        )
    try:
        table = _Table.model_validate(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExplorationError(f"{EXPLORATION}: the exploration table is not TOML: {error}") from error
    except ValidationError as error:
        raise ExplorationError(f"{EXPLORATION}: {_problems(error)}") from error
    surfaces: dict[str, Explorer] = {}
    for name, surface in table.surfaces.items():
        if name not in utility.surfaces:
            raise ExplorationError(
                f"{EXPLORATION}: surfaces.{name}: model {manifest.ref} ranks {', '.join(sorted(utility.surfaces))}; "
                "name one of these, or remove the surface"
            )
        tuned = utility.surfaces[name]
        if isinstance(surface, _WeightsSurface):
            surfaces[name] = _weights_explorer(name, surface, tuned, table.seed)
        else:
            surfaces[name] = OrderExplorer(
                table.seed, surface.share, surface.regret_max, tuned.weights,
                surface.best, surface.temperature, surface.floor,
            )  # fmt: skip
    return Exploration(hashlib.sha256(content).hexdigest(), table.seed, surfaces)


def _weights_explorer(surface: str, table: _WeightsSurface, tuned: SurfaceUtility, seed: int) -> WeightsExplorer:
    weights = np.tile(tuned.weights, (len(table.arms), 1))
    for row, (name, arm) in zip(weights, table.arms.items(), strict=True):
        for party, weight in arm.weights.items():
            if party not in tuned.parties:
                raise ExplorationError(
                    f"{EXPLORATION}: surfaces.{surface}.arms.{name}.weights: {party!r} is no party of this "
                    f"surface; its utility table has {', '.join(tuned.parties)}"
                )
            row[tuned.parties.index(party)] = weight
    probabilities = _probabilities(surface, table.arms)
    return WeightsExplorer(
        seed, table.share, table.regret_max, tuned.weights, tuple(table.arms), weights, probabilities
    )


def _probabilities(surface: str, arms: Mapping[str, _Arm]) -> np.ndarray:
    """Return float64[A], each arm's probability, with the sum 1."""
    stated = {name: arm.probability for name, arm in arms.items() if arm.probability is not None}
    if not stated:
        return np.full(len(arms), 1 / len(arms))
    without = [name for name in arms if name not in stated]
    if without:
        raise ExplorationError(
            f"{EXPLORATION}: surfaces.{surface}.arms.{without[0]} has no probability, but "
            f"{next(iter(stated))} has; state one for each arm, or for none, which makes them equally probable"
        )
    total = math.fsum(stated.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ExplorationError(
            f"{EXPLORATION}: surfaces.{surface}.arms: the probabilities sum to {total:g}; make them sum to 1"
        )
    return np.array(list(stated.values())) / total


def _problems(error: ValidationError) -> str:
    """Name each field at fault as the table spells it; pydantic adds the chosen kind to the path."""
    problems = []
    for e in error.errors():
        loc = [str(part) for part in e["loc"]]
        if len(loc) > 2 and loc[0] == "surfaces" and loc[2] in {"weights", "order"}:
            del loc[2]
        problems.append(f"{'.'.join(loc)}: {e['msg']}")
    return "; ".join(problems)
