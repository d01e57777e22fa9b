"""Answers of tiny@1 to simulated users, explored by a real explorer, as slates or as a joined dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.slates import Slates
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.golden import GoldenRequest, encode_golden
from model_store.exploration.explorer import Explored, Explorer, Propensities, Tuned
from model_store.exploration.table import load_exploration
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate
from model_store.model.selection import select
from model_store.model.utility import SurfaceUtility, load_utility, weighted_sum
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
SHUFFLED = "half of the requests in random order"
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


class Shuffler:
    """Shuffles half of the requests evenly, as no explorer of a server does: so any order of any network is covered."""

    def __init__(self, table: SurfaceUtility) -> None:
        self._weights = table.weights

    def explore(
        self, request_id: int, pin_ids: np.ndarray, party_utilities: np.ndarray, utilities: np.ndarray, top_k: int = 0
    ) -> Explored | Tuned:
        rng = np.random.default_rng([1, request_id])
        if rng.random() < 0.5:
            return Tuned()
        return Explored("shuffled", rng.permutation(len(pin_ids)), utilities, self._weights, 0.0, 0.0)

    def propensities(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        tuned = select(weighted_sum(party_utilities, self._weights)) == order
        count = len(order)
        return Propensities(0.5 * tuned.all() + 0.5 / math.factorial(count), 0.5 * tuned + 0.5 / count)


def explorer(content: str, table: str = tiny.UTILITY) -> Explorer | Shuffler:
    utility = load_utility(table.encode(), tiny.manifest())
    if content == SHUFFLED:
        return Shuffler(utility.surfaces["home"])
    return load_exploration(content.encode(), tiny.manifest(), utility).surfaces["home"]


@dataclass(frozen=True)
class Candidates:
    """R requests of 6 pins each, in the order of the requests: float32[R, 6, 2], float32[R, 6], and the stored rows."""

    probabilities: np.ndarray
    popularity: np.ndarray
    stored: list[bytes]


def candidates(requests: int, network: int = 1) -> Candidates:
    """Score stored rows with one of tiny's networks, as a server does."""
    manifest = tiny.manifest()
    engine, assembler = NumpyEngine(tiny.network(network), manifest.specs, 2), Assembler(manifest)
    probabilities, popularity, stored = [], [], []
    for request in range(requests):
        pins = list(range(request * PINS, (request + 1) * PINS))
        fetched = tiny.fetched(pins, [request % 7 + 1, request % 5 + 1], user=request % 20 + 1)
        probabilities.append(calibrate(manifest, engine.run(assembler.assemble(fetched, "home"))))
        popularity.append(fetched.candidate_rows("pin_core")["popularity"])
        stored.append(encode_golden([GoldenRequest(fetched, "home", probabilities[-1])]))
    return Candidates(np.stack(probabilities), np.stack(popularity), stored)


def slates(
    users: int = 150,
    per_user: int = 4,
    seed: int = 0,
    explore: str = WEIGHTS,
    table: str = tiny.UTILITY,
    shown: int = PINS,
    given: Candidates | None = None,
) -> Slates:
    """Answer requests of 6 candidates with `shown` pins each; they are saved as the heads say, less often further down.

    Args:
        users: number of users.
        per_user: requests of each.
        seed: draws candidates and users' actions.
        explore: the exploration table.
        table: the utility table.
        shown: number of pins in an answer.
        given: the candidates; None draws them.
    """
    rng, utility, chosen = (
        np.random.default_rng(seed),
        load_utility(table.encode(), tiny.manifest()),
        explorer(explore, table),
    )
    count = users * per_user
    probabilities = rng.uniform(0.05, 0.9, (count, PINS, 2)).astype(np.float32)
    popularity = rng.uniform(0, 1, (count, PINS)).astype(np.float32)
    if given is not None:
        probabilities, popularity = given.probabilities, given.popularity
    orders, arms, weights, orders_of, positions_of = [], [], [], [], []
    for request in range(count):
        columns = {"pin.popularity": popularity[request]}
        parties = utility.reference_utilities("home", probabilities[request], columns)
        tuned = utility.combine("home", parties)
        pins = np.arange(PINS, dtype=np.uint64) + request * PINS
        decision = chosen.explore(request + 1, pins, parties, tuned, shown)
        own = decision if isinstance(decision, Explored) else None
        order = select(tuned, shown) if own is None else own.order
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
    examined = np.tile((np.arange(shown) + 1.0) ** -0.5, count)
    labels = rng.random((count * shown, 2)) < ordered * examined[:, None]
    pin_ids = (order + np.arange(count)[:, None] * PINS).ravel().astype(np.uint64)
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
        row_splits=np.arange(count + 1) * shown,
        pin_ids=pin_ids,
        places=order.ravel().astype(np.uint32),
        probabilities=ordered,
        party_utilities=parties,
        attribute_values=attributes,
        utilities=np.concatenate(
            [weighted_sum(parties[r * shown : (r + 1) * shown], w) for r, w in enumerate(weights)]
        ),
        propensities=np.concatenate(positions_of),
        labels=labels,
        seen=np.ones(count * shown, bool),
    )


def write_joined(
    made: Slates, folder: Path, stored: Sequence[bytes | None] | None = None, more: Sequence[Row] = ()
) -> Path:
    """Log and join the slates; return the folder of the joined dataset.

    Args:
        made: the slates.
        folder: the folder to write.
        stored: the stored rows of each request; None for requests whose log keeps none.
        more: further actions.
    """
    answers: list[Row] = []
    acts: list[Row] = list(more)
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
                features=None if stored is None else stored[request],
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
