"""A tuning in words: the table of the parties, what to watch, and what deserves a second look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from ranker.evaluation.bootstrap import Estimate
from ranker.tuning.constants import ConstantSearch
from ranker.tuning.results import HeldOutCheck, PartyOutcome, Tuned
from ranker.tuning.tune import Goal

HEADINGS = (
    "party", "weight before", "weight after", "value before [95%]", "value after [95%]", "change [95%]", "at least",
    "exchange rate",
)  # fmt: skip


def party_rows(tuned: Tuned) -> list[tuple[str, ...]]:
    """Return one row per party, in the columns of `HEADINGS`."""
    return [
        (
            f"{party.party} ({party.role})",
            f"{party.weight_before:.6g}",
            f"{party.weight_after:.6g}",
            _interval(party.before),
            _interval(party.after),
            change(party),
            _theta(party),
            "" if party.multiplier is None else f"{party.multiplier:.4g}" if party.binding else "0, not binding",
        )
        for party in tuned.parties
    ]


def terminal_table(tuned: Tuned, maximised: str) -> Table:
    """Return the table of the parties."""
    table = Table(
        title=f"{tuned.requests:,} requests of {tuned.users:,} users",
        caption="Values are means per request of the positions' discounts times the party's utility. The exchange rate "
        f"is what one more unit for the party costs, in units of {maximised}.",
        caption_justify="left",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "party" else "right")
    for row in party_rows(tuned):
        table.add_row(*row)
    return table


def summary(tuned: Tuned) -> Iterator[str]:
    """Describe the objective, the gap and the checks, one sentence a line."""
    yield (
        f"objective: {tuned.deployed:.6g} per request (before: {tuned.before:.6g}); no orders that meet the thetas are "
        f"worth more than {tuned.bound:.6g}"
    )
    yield (
        f"duality gap: {tuned.gap:.1e} of the optimum; one order per request instead of a mixture loses "
        f"{tuned.lost_to_one_order:.1e}"
    )
    if not tuned.met:
        yield (
            "warning: with one order per request, the weights miss a theta by less than one request's worth; use more "
            "requests"
        )
    binding = [party.party for party in tuned.parties if party.binding]
    yield f"binding constraints: {', '.join(binding) or 'none, so every constrained party got the weight 0'}"
    for check in tuned.held_out:
        yield held_out_line(check, tuned)


def held_out_line(check: HeldOutCheck, tuned: Tuned) -> str:
    """Describe the check of one constraint on other users."""
    place = f"held out, {tuned.held_out_requests:,} requests of {tuned.held_out_users:,} other users"
    numbers = f"{check.party} gets {check.value:.6g}, at least {check.theta:.6g}"
    if not check.shortfall:
        return f"{place}: {numbers}: met"
    missed = f"missed by {check.shortfall:.2g}, {_share(check)}, {_errors(check)}"
    verdict = "within 1% and two standard errors" if check.holds else "warning: ask for a little more, or use more data"
    return f"{place}: {numbers}: {missed}; {verdict}"


def dropped_lines(in_force: Mapping[str, float], goal: Goal) -> Iterator[str]:
    """Name each theta of the table in force that nothing was asked for: nobody tunes for it or watches it any more."""
    asked = {theta.party for theta in goal.thetas}
    for party, theta in in_force.items():
        if party == goal.maximised:
            yield f"warning: the table in force requires {party} >= {theta:g}; as it is maximised now, that is gone"
        elif party not in asked:
            yield (
                f"warning: the table in force requires {party} >= {theta:g}, and the new one does not; to keep it, add "
                f"--at-least {party}={theta:g}"
            )


def search_lines(search: ConstantSearch) -> Iterator[str]:
    """Describe the search of constants."""
    for name, (before, after) in search.values.items():
        told = "stays, as no trial was better" if before == after else f"-> {after:g}"
        yield f"constant {name}, {before:g} in force: {told} ({search.trials} trials)"
    if search.held_out is not None:
        before_, after_, gain = (_interval(estimate) for estimate in search.held_out)
        yield (
            f"what the held-out users' actions are worth per request, by the constants in force: {before_}, by the "
            f"best ones: {after_}, difference: {gain}"
        )


def alert_lines(tuned: Tuned, surface: str) -> Iterator[str]:
    """Name the alert that watches the thetas once the table is served."""
    yield (
        f"once the table is served, the alert PinrankPartyBelowTheta (deploy/alerts/parties.yml) fires if on {surface} "
        f"{' or '.join(tuned.thetas)} gets less than its theta"
    )


def change(party: PartyOutcome) -> str:
    estimate = party.change_percent
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.1f}%"
    return f"{estimate.value:+.1f}% [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _theta(party: PartyOutcome) -> str:
    if party.theta is None or party.asked is None:
        return ""
    return f"{party.theta:.6g}" + (f" ({party.asked.written})" if party.asked.relative else "")


def _interval(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"


def _share(check: HeldOutCheck) -> str:
    return f"{check.shortfall / abs(check.theta):.2%}" if check.theta else "of a theta of 0"


def _errors(check: HeldOutCheck) -> str:
    return f"{check.shortfall / check.standard_error:.1f} standard errors" if check.standard_error else "no error known"
