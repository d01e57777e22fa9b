"""How another policy would have ordered the pins of logged answers, and with what probability.

Another policy might have shown pins that a logged answer left out, and the log does not hold those. So policies are
evaluated on the answers that hold all candidates of their requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from impressions.slates import Slates
from model_store.exploration.explorer import Explorer
from model_store.exploration.propensities import propensities
from model_store.model.utility import SurfaceUtility, UtilityError, load_surface, weighted_sum
from ranker.counterfactual.rewards import row_values
from ranker.errors import PropensityError


@dataclass(frozen=True, slots=True)
class Placement:
    """Each pin is at one position with one chance; over all placements of a policy, each pin's chances sum to 1.

    Attributes:
        chances: float64[N].
        positions: int64[N].
    """

    chances: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, slots=True)
class EvaluatedPolicy:
    """A policy over the R requests and N shown pins of some slates.

    Attributes:
        name: as reports name it.
        order_probabilities: float64[R], of the logged order.
        position_probabilities: float64[N], of each pin at its logged position.
        placements: where the policy puts each pin.
        logs: whether it is the policy that logged.
    """

    name: str
    order_probabilities: np.ndarray
    position_probabilities: np.ndarray
    placements: tuple[Placement, ...]
    logs: bool = False


def whole_answers(slates: Slates) -> Slates:
    """Return the answers with all candidates of their requests; also without those to no candidate at all.

    Raises:
        PropensityError: there are answers, and none is whole.
    """
    counts = np.diff(slates.row_splits)
    kept = (counts == slates.candidates) & (counts > 0)
    if len(kept) and not kept.any():
        raise PropensityError(
            f"none of the {len(kept):,} answers holds all candidates of its request. A policy might have shown others, "
            "which the log does not hold: send top_k = 0 in the requests that should count, or serve the policy as a "
            "canary"
        )
    return slates.where(kept)


def logging_policy(slates: Slates) -> EvaluatedPolicy:
    """Return the policy that logged. All its weights are exactly 1, and it puts pins where they were."""
    where = Placement(np.ones(len(slates.pin_ids)), slates.positions)
    return EvaluatedPolicy("logged", slates.order_propensities, slates.propensities, (where,), logs=True)


def surface_table(content: bytes, slates: Slates, where: str) -> SurfaceUtility:
    """Compile a utility table for logged answers.

    Args:
        content: the text of a utility table.
        slates: the answers; expressions may use their heads and attributes.
        where: the name of the table in errors.

    Raises:
        PropensityError: the table is invalid, or reads something that was not logged.
    """
    try:
        return load_surface(content, slates.surface, {*slates.heads, *slates.attributes})
    except UtilityError as error:
        raise PropensityError(
            f"{where}: {error}. The log holds the heads {', '.join(slates.heads)} and the attributes "
            f"{', '.join(slates.attributes) or '(none)'} of {slates.model}: to evaluate another attribute, serve a "
            "utility table that reads it, with weight 0 if need be, and log with it"
        ) from error


def party_utilities(table: SurfaceUtility, slates: Slates) -> np.ndarray:
    """Return float64[N, P], each party's utility of each shown pin by the logged probabilities."""
    return np.column_stack([row_values(e, slates.probabilities, slates) for e in table.expressions])


def utility_policy(name: str, table: SurfaceUtility, slates: Slates) -> EvaluatedPolicy:
    """Return the policy that orders by a utility table, as the server does: equal utilities by place in the request.

    Raises:
        PropensityError: an answer does not hold all candidates of its request (see `whole_answers`).
    """
    _check_whole(slates)
    utilities = weighted_sum(party_utilities(table, slates), table.weights)
    requests = np.repeat(np.arange(slates.requests), np.diff(slates.row_splits))
    key = np.where(np.isfinite(utilities), -utilities, np.inf)
    order = np.lexsort((slates.places, key, requests))
    positions = np.empty(len(key), np.int64)
    positions[order] = slates.positions  # rows of a request stay together, so its k-th best gets position k
    same = positions == slates.positions
    whole = np.logical_and.reduceat(same, slates.row_splits[:-1]) if slates.requests else same[:0]
    where = Placement(np.ones(len(key)), positions)
    return EvaluatedPolicy(name, whole.astype(np.float64), same.astype(np.float64), (where,))


def exploring_policy(name: str, table: SurfaceUtility, explorer: Explorer, slates: Slates) -> EvaluatedPolicy:
    """Return the policy that orders by a utility table and explores.

    Where a pin is, follows from the explorer's own exact probabilities: of K orders, each one the logged order rotated
    by one more position, so that every pin stands once at every position.

    Cost: about 10 us per shown pin.

    Raises:
        PropensityError: an answer does not hold all candidates of its request (see `whole_answers`).
    """
    _check_whole(slates)
    found = party_utilities(table, slates)
    counts = np.diff(slates.row_splits)
    chances = np.zeros((len(slates.pin_ids), int(counts.max())))
    orders, positions = np.empty(slates.requests), np.empty(len(slates.pin_ids))
    for request, (start, stop) in enumerate(pairwise(slates.row_splits.tolist())):
        places = slates.places[start:stop].astype(np.int64)
        candidates = np.empty_like(found[start:stop])
        candidates[places] = found[start:stop]  # as the server had them
        turned = [np.roll(np.arange(stop - start), turn) for turn in range(stop - start)]
        all_rotated = propensities([(explorer, candidates, places[rows]) for rows in turned])
        for turn, (rows, rotated) in enumerate(zip(turned, all_rotated, strict=True)):
            chances[start + rows, np.arange(stop - start)] = rotated.positions
            if turn == 0:
                orders[request], positions[start:stop] = rotated.order, rotated.positions
    row_counts = np.repeat(counts, counts)
    placements = tuple(
        Placement(chances[:, position], np.minimum(position, row_counts - 1)) for position in range(chances.shape[1])
    )
    return EvaluatedPolicy(name, np.minimum(orders, 1), np.minimum(positions, 1), placements)


def _check_whole(slates: Slates) -> None:
    cut = np.diff(slates.row_splits) != slates.candidates
    if cut.any():
        raise PropensityError(
            f"{np.count_nonzero(cut):,} of {len(cut):,} answers do not hold all candidates of their requests; leave "
            "them out"
        )
