"""The caveats of an evaluation, derived from the facts of the run."""

from __future__ import annotations

from datetime import UTC, datetime

from ranker.data.requests import PINS_MAX
from ranker.evaluation.bootstrap import LEVEL
from ranker.evaluation.results import Evaluation

#: Below these numbers an average is only a hint, and percentile intervals are too narrow.
REQUESTS_FEW = 200
USERS_FEW = 50


def caveats(evaluation: Evaluation) -> list[str]:
    """Return the caveats as sentences, the most general first."""
    return [*_of_the_data(evaluation), *_of_the_numbers(evaluation), *_of_the_bundles(evaluation)]


def day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _of_the_data(evaluation: Evaluation) -> list[str]:
    share = evaluation.requests_without_history / max(1, evaluation.requests)
    shown = "The data does not contain the pins that a frontend showed. "
    if evaluation.events_without_action:
        shown = (
            f"{evaluation.events_without_action:,} of the {evaluation.events:,} logged pins of the period were shown "
            "and received none of these actions. An earlier ranking chose them; the pins that it left out are unknown. "
        )
    exposure = (
        f"{shown}Candidates are the logged pins, filled up to {evaluation.candidates} with uniform samples of pins "
        "that occur in none of the user's events (new pins as often as events are on new pins). A sampled pin counts "
        "as a pin without an action, although the user may never have seen it, and most sampled pins are easier to "
        "distinguish than those of real candidate generators. Probabilities are relative to these candidates; other "
        "candidates would change them."
    )
    positions = "No positions were logged, so position bias can be neither measured nor corrected."
    requests = (
        f"Requests are reconstructed: up to {PINS_MAX} consecutive events of a user count as the result of one "
        "request, and half of the requests start from the user's last pin with a strong positive action."
    )
    replay = (
        "The evaluation replays the past. Only an online test shows how users react to an order that they have never "
        "seen: novelty, feedback between ranking and behaviour, and long-term effects are not measured here."
    )
    history = (
        f"{evaluation.requests_without_history:,} of {evaluation.requests:,} requests ({share:.1%}) come from users "
        "without any earlier action. The data contains only users who then acted, not those who left."
    )
    period = (
        f"The test covers one period, {day(evaluation.test_start_ms)} to {day(evaluation.test_stop_ms)}, and says "
        "nothing about other seasons. The evaluation does not check when the training data of a bundle ended; whoever "
        "trained it must make sure that it has not seen this period."
    )
    return [exposure, positions, requests, replay, history, period]


def _of_the_numbers(evaluation: Evaluation) -> list[str]:
    found = []
    if evaluation.resamples:
        found.append(
            f"{LEVEL:.0%} intervals reflect only the choice of users in the test, neither the sampling of candidates "
            "(one seed) nor the randomness of training (one training per bundle). AUC and ECE have no intervals. About "
            "one interval in twenty misses the true value, so a large table contains some that do."
        )
    else:
        found.append("No intervals were computed, so differences may be due to chance.")
    found += [
        f"{head.head} is small: {head.positives:,} candidates received it, in {head.requests:,} requests of "
        f"{head.users:,} users. Its numbers are only hints, and its intervals are probably too narrow."
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
            f"{', '.join(against)}: by utility, lower is better; by head, higher is better, because that order puts "
            "the pins first that are most likely to receive the action. Sampled pins received no action at all, so a "
            "model that finds more pins with any action also ranks more of these higher: read them together with the "
            "other heads."
        )
    return found


def _of_the_bundles(evaluation: Evaluation) -> list[str]:
    trade = (
        "By utility, heads compete for the same three places with weights that people chose: one head's gain can be "
        "another's loss, and other weights give other numbers. Popularity has no utility."
    )
    found = [trade]
    for scorer in evaluation.scorers:
        if scorer.utility_missing is not None:
            found.append(f"The utility of {scorer.name} cannot be evaluated here: {scorer.utility_missing}")
        if scorer.heads_missing:
            found.append(
                f"{scorer.name} does not predict {', '.join(scorer.heads_missing)}, so these heads have no numbers by "
                "head."
            )
    trained_on = {scorer.trained_on for scorer in evaluation.scorers}
    if evaluation.data and trained_on - {evaluation.data}:
        others = ", ".join(f"{s.name}: {s.trained_on!r}" for s in evaluation.scorers if s.trained_on != evaluation.data)
        found.append(f"According to their manifests, not all bundles were trained on {evaluation.data!r} ({others}).")
    return found
