"""Writes tuned weights, thetas and constants into a utility table, and leaves all else in it as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tomlkit
from tomlkit.items import Table

from model_store.bundle.files import Bundle
from model_store.bundle.manifest import Tuning
from model_store.model.utility import fingerprint
from ranker.errors import SettingError
from ranker.evaluation.bootstrap import Estimate
from ranker.tuning.inputs import TuningData, utility_of
from ranker.tuning.results import PartyOutcome, TunedWeights
from ranker.tuning.tables import change
from ranker.tuning.tune import Goal


def with_expressions(content: bytes, surface: str, expressions: Mapping[str, str]) -> bytes:
    """Return a table with other expressions for some parties of a surface."""
    document: Any = tomlkit.parse(content.decode())
    document["surfaces"][surface]["utilities"].update(expressions)
    return tomlkit.dumps(document).encode()


def tuned_table(
    content: bytes, bundle: Bundle, data: TuningData, goal: Goal, tuned: TunedWeights, notes: Sequence[str] = ()
) -> bytes:
    """Return the table with the tuned weights and thetas of one surface, and with what explains them.

    Args:
        content: the table to change, as TOML; other surfaces, comments and formatting stay.
        bundle: the bundle that scored the requests.
        data: the requests.
        goal: what was asked for.
        tuned: the result.
        notes: sentences to add to its comment.

    Raises:
        SettingError: the table is written in a way that the numbers cannot be put into.
    """
    document: Any = tomlkit.parse(content.decode())
    surface = document["surfaces"][data.surface]
    for outcome in tuned.parties:
        if outcome.role == "constrained":
            surface["weights"][outcome.party] = outcome.weight_after
    thetas = tomlkit.inline_table()
    thetas.update(tuned.thetas)
    surface["at_least"] = thetas
    stated = document.setdefault("tuning", tomlkit.table(is_super_table=True))
    written = tomlkit.dumps(document).encode()
    table = utility_of(bundle, data.surface, written).surfaces[data.surface]
    facts = Tuning(
        maximised=goal.maximised,
        model=bundle.manifest.ref,
        data=data.name,
        since_ms=data.since_ms,
        until_ms=data.until_ms,
        requests=tuned.requests,
        users=tuned.users,
        gap=float(f"{tuned.gap:.3g}"),
    )
    stated[data.surface] = _statement(facts, fingerprint(table), tuned, notes)
    written = tomlkit.dumps(document).encode()
    after = utility_of(bundle, data.surface, written).surfaces[data.surface]
    if not np.array_equal(after.weights, tuned.weights) or after.at_least != tuned.thetas:
        raise SettingError(
            f"cannot write the weights of {data.surface} into this table; write its weights as "
            "`weights = { pinner = 1.0 }` under [surfaces.NAME]"
        )
    return written


def _statement(facts: Tuning, digest: str, tuned: TunedWeights, notes: Sequence[str]) -> Table:
    table = tomlkit.table()
    table.add(tomlkit.comment(f"Weights tuned by `pinrank tune`: the most for {facts.maximised}, given at_least."))
    for outcome in tuned.parties:
        table.add(tomlkit.comment(_explained(outcome, facts.maximised)))
    for note in notes:
        table.add(tomlkit.comment(note))
    for name, value in facts.model_dump(exclude={"thetas"}).items():
        table.add(name, value)
    table.add("fingerprint", digest)
    return table


def _explained(outcome: PartyOutcome, maximised: str) -> str:
    text = (
        f"{outcome.party}: {_value(outcome.before)} -> {_value(outcome.after)} per request (change: {change(outcome)})"
    )
    if outcome.role != "constrained":
        return text
    if not outcome.binding:
        return f"{text}; at least {outcome.theta:.6g} costs nothing"
    return f"{text}; one more unit costs {outcome.multiplier:.4g} of {maximised}"


def _value(estimate: Estimate) -> str:
    return "-" if estimate.value is None else f"{estimate.value:.4g}"
