"""Judges whether a label's answers give every party enough: its thetas, and what the default label gives. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from model_store.model.utility import UtilityTable
from server.request.parties import PartyMean
from server.rollout.guard import Breach

#: A mean must be beyond its limit by so many standard errors. The guard looks once a second: a mean that is exactly at
#: its limit, as those of tuned thetas are, would be 3 standard errors below it by chance within a day.
_STANDARD_ERRORS = 4.0
#: Sums of equal values round, so a mean may miss a theta that it meets by this share; the errors are 0 then.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class PartyOfSurface:
    """A party's means on one surface in the window.

    Attributes:
        surface: the surface.
        party: the party.
        own: what the label's requests were worth to it.
        default: what the default label's requests were worth to it; None if the two cannot be compared, because the
            default label's table lacks the party or has another expression for it.
        theta: the least mean that the label's utility table states (`at_least`); None if it states none.
    """

    surface: str
    party: str
    own: PartyMean
    default: PartyMean | None
    theta: float | None


def compared(
    own: Mapping[str, Mapping[str, PartyMean]],
    default: Mapping[str, Mapping[str, PartyMean]],
    utility: UtilityTable,
    default_utility: UtilityTable,
) -> list[PartyOfSurface]:
    """List the parties of a label's surfaces.

    Args:
        own: the label's means, by surface and party.
        default: those of the default label.
        utility: the label's utility table.
        default_utility: that of the default label.
    """
    found = []
    for surface, means in own.items():
        usual = default.get(surface, {})
        table, sources = utility.surfaces[surface], _sources(utility, surface)
        theirs = _sources(default_utility, surface) if usual else {}
        for party, mean in means.items():
            alike = sources[party] == theirs.get(party)
            other = usual.get(party) if alike else None
            found.append(PartyOfSurface(surface, party, mean, other, table.at_least.get(party)))
    return found


def judge_parties(parties: list[PartyOfSurface], requests_min: int, loss_max: float) -> Breach | None:
    """Find a party that gets too little, beyond what chance explains.

    A label is in breach if on some surface a party's mean plus 4 standard errors is below its theta, or if the default
    label's mean exceeds it by more than `loss_max` of its amount plus 4 standard errors of the difference. Standard
    errors are over requests.

    Args:
        parties: the parties of all surfaces.
        requests_min: requests of the surface that are needed before the guard judges, of the label and of the default.
        loss_max: the largest loss, as a fraction of the default label's mean.

    Returns:
        The first breach, or None.
    """
    for one in parties:
        own, default, theta = one.own, one.default, one.theta
        if own.requests < requests_min:
            continue
        where = f"the utility of {one.party} on {one.surface} is {_shown(own)} per request"
        if theta is not None and own.mean + _STANDARD_ERRORS * own.error < theta - _ROUNDING * abs(theta):
            return Breach(f"{where}, but at_least requires {theta:.4g}")
        if default is None or default.requests < requests_min:
            continue
        noise = _STANDARD_ERRORS * math.hypot(own.error, default.error)
        if default.mean - own.mean > (loss_max + _ROUNDING) * abs(default.mean) + noise:
            return Breach(f"{where}, against the default label's {_shown(default)}; the limit is {loss_max:.0%} less")
    return None


def _sources(utility: UtilityTable, surface: str) -> dict[str, str]:
    table = utility.surfaces[surface]
    return dict(zip(table.parties, table.sources, strict=True))


def _shown(mean: PartyMean) -> str:
    return f"{mean.mean:.4g} (standard error {mean.error:.2g}, {mean.requests} requests)"
