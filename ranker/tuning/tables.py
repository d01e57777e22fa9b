"""A tuning in words: the table of the parties, what to watch, and what deserves a second look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from ranker.evaluation.bootstrap import Estimate
from ranker.tuning.inputs import WHOLE_USERS_MIN, AnswerCounts
from ranker.tuning.results import (
    SHORT_ERRORS_MAX,
    SHORT_SHARE_MAX,
    ConstantSearch,
    HeldOutCheck,
    PartyOutcome,
    TunedWeights,
)
from ranker.tuning.tune import Goal

HEADINGS = (
    "party", "weight before", "weight after", "value before [95%]", "value after [95%]", "change [95%]", "at least",
    "exchange rate",
)  # fmt: skip


def party_rows(tuned: TunedWeights) -> list[tuple[str, ...]]:
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


def terminal_table(tuned: TunedWeights, maximised: str) -> Table:
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


def summary(tuned: TunedWeights) -> Iterator[str]:
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
    yield from near_zero_lines(tuned)
    binding = [party.party for party in tuned.parties if party.binding]
    yield f"binding constraints: {', '.join(binding) or 'none, so every constrained party got the weight 0'}"
    for check in tuned.held_out:
        yield held_out_line(check, tuned)


def held_out_line(check: HeldOutCheck, tuned: TunedWeights) -> str:
    """Describe the check of one constraint on other users."""
    place = f"held out, {tuned.held_out_requests:,} requests of {tuned.held_out_users:,} other users"
    numbers = f"{check.party} gets {check.value:.6g}, at least {check.theta:.6g}"
    if not check.shortfall:
        return f"{place}: {numbers}: met"
    return f"{place}: {numbers}: missed by {check.shortfall:.2g}, {_share(check)}, {_errors(check)}; {_verdict(check)}"


def _verdict(check: HeldOutCheck) -> str:
    share, errors = f"{SHORT_SHARE_MAX:.0%}", f"{SHORT_ERRORS_MAX:g} standard errors"
    if check.holds:
        return f"within {share} and within {errors}" if check.theta else f"within {errors}"
    if not check.small and check.by_chance:
        return f"warning: more than {share}, which may be chance: hold out more users to know"
    beyond = f"more than {share} and more than {errors}" if not check.small else f"more than {errors}"
    return f"warning: {beyond}: ask for a little more, or tune on more requests"


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


def answer_lines(answers: AnswerCounts | None) -> Iterator[str]:
    """Say which logged answers leave candidates out, and whether they were tuned on."""
    if answers is None or not answers.cut:
        return
    sizes = f"{answers.cut:,} of {answers.whole + answers.cut:,} answers do not hold all candidates of their requests"
    if answers.whole_only:
        yield (
            f"{sizes} and were left out; their requests have {answers.cut_candidates:.4g} candidates on average, and "
            f"those tuned on have {answers.whole_candidates:.4g}"
        )
        return
    whole = f"the {answers.whole:,} others are of {answers.whole_users:,} users" if answers.whole else "none does"
    yield (
        f"warning: {sizes}, and {whole}, so all were tuned on. In these, other weights could only reorder the "
        "pins that were shown, so the values of other weights and what is attainable are not those of all candidates. "
        f"Send top_k = 0 in some requests: whole answers to {WHOLE_USERS_MIN} users are tuned on alone"
    )


def search_lines(search: ConstantSearch) -> Iterator[str]:
    """Describe the search of constants: which were kept or changed, and why."""
    for name, (before, best) in search.values.items():
        if search.adopted:
            told = f"-> {best:g}, because the held-out users gain by it"
        elif search.held_out is None:
            told = "stays, as no trial was better"
        else:
            told = (
                f"stays; {best:g} was the best on the users tuned on, but the held-out users do not clearly gain by it"
            )
        yield f"constant {name}, {before:g} in force: {told} ({search.trials} trials)"
    if search.held_out is not None:
        before_, after_, gain = (_interval(estimate) for estimate in search.held_out)
        above = "above 0" if search.adopted else "not above 0"
        yield (
            f"what the held-out users' actions are worth per request, by the constants in force: {before_}, by the "
            f"best ones: {after_}, difference: {gain}, {above}"
        )


def alert_lines(tuned: TunedWeights, surface: str) -> Iterator[str]:
    """Name the alert that watches the thetas once the table is served."""
    yield (
        f"once the table is served, the alert PinrankPartyBelowTheta (deploy/alerts/parties.yml) fires if on {surface} "
        f"{' or '.join(tuned.thetas)} gets less than its theta"
    )


def change(party: PartyOutcome) -> str:
    """Describe the change in percent; or as a value, where the value before may be 0."""
    estimate, digits, unit = (party.change, ".4g", "") if party.near_zero else (party.change_percent, ".1f", "%")
    if estimate.value is None:
        return "-"
    text = f"{estimate.value:+{digits}}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:+{digits}}, {estimate.high:+{digits}}]"


def near_zero_lines(tuned: TunedWeights) -> Iterator[str]:
    """Say which changes are not in percent, and which thetas are percentages of a value that may be 0."""
    near = [party for party in tuned.parties if party.near_zero]
    if near:
        yield (
            f"the change of {', '.join(party.party for party in near)} is a value and not a percentage, because the "
            "interval of the value before includes 0"
        )
    for party in near:
        if party.asked is not None and party.asked.relative:
            yield (
                f"warning: {party.party}={party.asked.written} is a percentage of {_interval(party.before)}, which may "
                f"be 0; ask for a value, e.g. {party.party}={party.theta:.6g}"
            )


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
