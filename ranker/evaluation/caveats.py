"""What an evaluation cannot show, from the facts of the run: read before believing a number."""

from __future__ import annotations

from datetime import UTC, datetime

from ranker.data.requests import PINS_MAX
from ranker.evaluation.bootstrap import LEVEL
from ranker.evaluation.results import Evaluation

#: Below these an average is a hint at best; so few that intervals by percentiles of resamples are too narrow.
REQUESTS_FEW = 200
USERS_FEW = 50


def caveats(evaluation: Evaluation) -> list[str]:
    """Return sentences, the most general first."""
    return [*_of_the_data(evaluation), *_of_the_numbers(evaluation), *_of_the_bundles(evaluation)]


def day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _of_the_data(evaluation: Evaluation) -> list[str]:
    share = evaluation.requests_without_history / max(1, evaluation.requests)
    shown = "What a frontend showed is not in the data. "
    if evaluation.events_without_action:
        shown = (
            f"{evaluation.events_without_action:,} of the period's {evaluation.events:,} logged pins were shown and "
            "received none of these actions; an earlier ranking chose what was shown, and what it left out is unknown. "
        )
    exposure = (
        f"{shown}Candidates are the logged pins, filled up to {evaluation.candidates} with uniform draws from pins "
        "that are in none of the user's events (new pins as often as events are on new pins). A drawn pin counts as "
        "one without an action, though the user may never have seen it, and most are easier to tell apart than what "
        "candidate generators would send. Probabilities are relative to these candidates and shift with others."
    )
    positions = "No positions were logged, so position bias can neither be measured nor corrected."
    requests = (
        f"Requests are made up: up to {PINS_MAX} consecutive events of a user count as what one request led to, and "
        "half of the requests are asked from the last pin that the user wanted."
    )
    replay = (
        "This replays the past. What users do with an order they were never shown takes an online test to learn: "
        "novelty, feedback between ranking and behaviour, and long-term effects are all outside."
    )
    history = (
        f"{evaluation.requests_without_history:,} of {evaluation.requests:,} requests ({share:.1%}) come from users "
        "without any earlier action. Only users who then acted are in the data; those who left are not."
    )
    period = (
        f"The test is one period, {day(evaluation.test_start_ms)} to {day(evaluation.test_stop_ms)}; nothing is said "
        "of other seasons. Bundles do not record where their training data ended: that none has seen this period is "
        "up to whoever trained them."
    )
    return [exposure, positions, requests, replay, history, period]


def _of_the_numbers(evaluation: Evaluation) -> list[str]:
    found = []
    if evaluation.resamples:
        found.append(
            f"{LEVEL:.0%} intervals cover which users were in the test, nothing else: not the draw of candidates (one "
            "seed), not the randomness of training (one training per bundle). AUC and ECE have none. About one "
            "interval in twenty misses the truth, so a table of many holds some that do."
        )
    else:
        found.append("No intervals were computed: nothing says which differences are chance.")
    found += [
        f"{head.head} is small: {head.positives:,} candidates received it, in {head.requests:,} requests of "
        f"{head.users:,} users. Read its numbers as hints; its intervals are too narrow if anything."
        for head in evaluation.heads
        if head.requests < REQUESTS_FEW or head.users < USERS_FEW
    ]
    found += [
        f"The slice {part.name} is small: {part.requests:,} requests of {part.users:,} users."
        for part in evaluation.slices
        if part.requests < REQUESTS_FEW or part.users < USERS_FEW
    ]
    against = [head.head for head in evaluation.heads if head.lower_is_better]
    if against:
        found.append(
            f"{', '.join(against)}: by utility lower is better, by head higher is better, because there the order puts "
            "first what is most likely to receive it. Drawn pins received no action at all, so a model that finds more "
            "of the pins acted on also brings up more of these: read them beside the other heads, not alone."
        )
    return found


def _of_the_bundles(evaluation: Evaluation) -> list[str]:
    trade = (
        "By utility, heads compete for the same three places, with weights that people chose: one head's gain can be "
        "another's loss, and other weights give other numbers. Popularity has no utility."
    )
    found = [trade]
    for scorer in evaluation.scorers:
        if scorer.utility_missing is not None:
            found.append(f"{scorer.name}: its utility cannot be evaluated here: {scorer.utility_missing}")
        if scorer.heads_missing:
            found.append(f"{scorer.name} does not predict {', '.join(scorer.heads_missing)}: not measured by head.")
    trained_on = {scorer.trained_on for scorer in evaluation.scorers}
    if evaluation.data and trained_on - {evaluation.data}:
        others = ", ".join(f"{s.name}: {s.trained_on!r}" for s in evaluation.scorers if s.trained_on != evaluation.data)
        found.append(f"Not every bundle says that it was trained on {evaluation.data!r} ({others}).")
    return found
