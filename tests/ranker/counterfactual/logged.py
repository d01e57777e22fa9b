"""Answers of tiny@1 to simulated users, explored by a real explorer, as slates or as a joined dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.slates import Slates
from model_store.exploration.explorer import Explored, Explorer
from model_store.exploration.table import load_exploration
from model_store.model.selection import select
from model_store.model.utility import load_utility, weighted_sum
from tests import tiny
from tests.impressions.logs import Row, action, impression, log_of

PINS, DAY_MS = 6, 86_400_000
BASE_MS = 1_700_000_000_000
ATTRIBUTE = "pin.popularity"
WEIGHTS = """
seed = 5
[surfaces.home]
kind = "weights"
share = 0.6
regret_max = 1.0
[surfaces.home.arms.more]
weights = { creator = 2.0 }
[surfaces.home.arms.less]
weights = { creator = 0.0 }
"""
ORDER = """
seed = 5
[surfaces.home]
kind = "order"
share = 0.8
regret_max = 1.0
best = 4
temperature = 0.3
floor = 0.1
"""


def explorer(content: str) -> Explorer:
    utility = load_utility(tiny.UTILITY.encode(), tiny.manifest())
    return load_exploration(content.encode(), tiny.manifest(), utility).surfaces["home"]


def slates(users: int = 150, per_user: int = 4, seed: int = 0, explore: str = WEIGHTS) -> Slates:
    """Answer requests of 6 pins each; pins are saved as the heads say, less often further down."""
    rng, utility, chosen = (
        np.random.default_rng(seed),
        load_utility(tiny.UTILITY.encode(), tiny.manifest()),
        explorer(explore),
    )
    count = users * per_user
    probabilities = rng.uniform(0.05, 0.9, (count, PINS, 2)).astype(np.float32)
    popularity = rng.uniform(0, 1, (count, PINS)).astype(np.float32)
    orders, arms, weights, orders_of, positions_of = [], [], [], [], []
    for request in range(count):
        columns = {"pin.popularity": popularity[request]}
        parties = utility.reference_utilities("home", probabilities[request], columns)
        tuned = utility.combine("home", parties)
        pins = np.arange(PINS, dtype=np.uint64) + request * PINS
        decision = chosen.explore(request + 1, pins, parties, tuned)
        own = decision if isinstance(decision, Explored) else None
        order = select(tuned) if own is None else own.order
        propensities = chosen.propensities(parties, order)
        orders.append(order)
        arms.append("" if own is None else own.arm)
        weights.append(utility.surfaces["home"].weights if own is None else own.party_weights)
        orders_of.append(propensities.order)
        positions_of.append(propensities.positions)
    order = np.stack(orders)
    ordered = np.take_along_axis(probabilities, order[:, :, None], axis=1).reshape(-1, 2)
    attributes = np.take_along_axis(popularity, order, axis=1).reshape(-1, 1).astype(np.float64)
    parties = utility.reference_utilities("home", ordered, {"pin.popularity": attributes[:, 0]})
    examined = np.tile((np.arange(PINS) + 1.0) ** -0.5, count)
    labels = rng.random((count * PINS, 2)) < ordered * examined[:, None]
    shown = (order + np.arange(count)[:, None] * PINS).ravel().astype(np.uint64)
    return Slates(
        surface="home",
        model="tiny@1",
        utility_digest=utility.digest,
        heads=tiny.HEADS,
        parties=("pinner", "creator"),
        attributes=(ATTRIBUTE,),
        actions=tiny.HEADS,
        request_ids=np.arange(1, count + 1, dtype=np.uint64),
        user_ids=np.repeat(np.arange(1, users + 1), per_user).astype(np.uint64),
        time_ms=BASE_MS + np.arange(count) * (2 * DAY_MS // count),
        arms=np.array(arms),
        party_weights=np.stack(weights),
        order_propensities=np.array(orders_of),
        candidates=np.full(count, PINS),
        row_splits=np.arange(count + 1) * PINS,
        pin_ids=shown,
        places=order.ravel(),
        probabilities=ordered,
        party_utilities=parties,
        attribute_values=attributes,
        utilities=np.concatenate([weighted_sum(parties[r * PINS : (r + 1) * PINS], w) for r, w in enumerate(weights)]),
        propensities=np.concatenate(positions_of),
        labels=labels,
        seen=np.ones(count * PINS, bool),
    )


def write_joined(made: Slates, folder: Path) -> Path:
    """Log and join the slates; return the folder of the joined dataset."""
    answers: list[Row] = []
    acts: list[Row] = []
    for request, (start, stop) in enumerate(zip(made.row_splits[:-1], made.row_splits[1:], strict=True)):
        rows, time_ms = slice(start, stop), int(made.time_ms[request])
        number, user = int(made.request_ids[request]), int(made.user_ids[request])
        pins = made.pin_ids[rows].tolist()
        answers.append(
            impression(
                number,
                time_ms,
                user,
                pins,
                candidates=int(made.candidates[request]),
                places=made.places[rows].tolist(),
                model=made.model,
                utility_digest=made.utility_digest,
                heads=list(made.heads),
                parties=list(made.parties),
                attributes=list(made.attributes),
                arm=str(made.arms[request]) or None,
                party_weights=made.party_weights[request].tolist(),
                order_propensity=float(made.order_propensities[request]),
                probabilities=made.probabilities[rows].ravel().tolist(),
                party_utilities=made.party_utilities[rows].ravel().tolist(),
                attribute_values=made.attribute_values[rows].ravel().tolist(),
                utilities=made.utilities[rows].tolist(),
                propensities=made.propensities[rows].tolist(),
            )
        )
        for position, column in zip(*np.nonzero(made.labels[rows]), strict=True):
            acts.append(
                action(
                    len(acts) + 1, user, pins[position], time_ms + 1000,
                    action=made.actions[column], request_id=number, position=int(position),
                )
            )  # fmt: skip
    join_log(log_of(answers, acts), folder, Wanted(Window(after_ms=60_000, skew_ms=0)))
    return folder
