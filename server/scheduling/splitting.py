"""Decides how many rows of a ticket go into its next run, from sizes and predicted seconds. Pure."""

from __future__ import annotations

import math

from server.scheduling.cost import CostModel

#: A ticket is large if it has more than this many times the rows of a typical one.
_LARGE = 2
#: Value of a stream's second while all streams are idle, relative to a second of a request's latency.
_COST_OF_IDLE = 0.1
#: Pieces of a large ticket are so large that a run's fixed cost is at most this fraction of its time.
_OVERHEAD_MAX = 0.15


def is_large(rows: int, typical_rows: float) -> bool:
    """Return whether a ticket is much larger than a typical one; False if no typical size is known (NaN, inf)."""
    return rows > _LARGE * typical_rows


def rows_a_stream(rows: int, streams: int) -> int:
    """Return the rows of the largest part when a ticket is split evenly over streams."""
    return -(-rows // streams) if streams > 1 else rows


def large_piece_rows(rows: int, typical_rows_of_others: float, cost: CostModel) -> int:
    """Return the rows of the next piece of a large ticket, which is short so that others soon get a stream."""
    piece = math.ceil(max(typical_rows_of_others / 2, _least_rows(cost)))
    if piece < rows < 2 * piece:
        # Make the last two pieces equal, rather than pay for a whole run with a small one.
        return math.ceil(rows / 2)
    return min(rows, piece)


def part_rows(rows: int, usable: int, needed: int, next_free_s: float | None, cost: CostModel) -> int:
    """Return the rows of the next part of a ticket, such that all parts end together.

    Args:
        rows: rows that are in no run yet.
        usable: idle streams.
        needed: idle streams that other tickets need.
        next_free_s: predicted seconds until a busy stream is free; None if none is busy or others wait for it.
        cost: cost model of the ticket's model.
    """
    if usable - needed > 1:
        return rows_a_stream(rows, usable - needed)
    if usable <= 0 or next_free_s is None:
        return rows
    # The remaining rows can start on the next free stream.
    half = (rows + 1) // 2
    per_row_s = (cost.predict_s(1, rows) - cost.predict_s(1, half)) / max(1, rows // 2)
    return min(rows, math.ceil((rows + next_free_s / per_row_s) / 2)) if per_row_s > 0 else rows


def splitting_pays(rows: int, part: int, load: float, cost: CostModel) -> bool:
    """Return whether additional runs shorten the answer by more than they cost the streams.

    Whole, the ticket would run while other streams are idle; its parts slow each other down.

    Args:
        rows: rows that are in no run yet.
        part: rows of the first of the parts, which end together.
        load: fraction of the streams' recent time that was used.
        cost: cost model of the ticket's model.
    """
    whole_s, part_s = cost.measured_s(rows, alone=True), cost.measured_s(part, alone=False)
    whole_parts = (rows - 1) // part
    last = rows - whole_parts * part
    all_s = whole_parts * part_s + (part_s if last == part else cost.measured_s(last, alone=False))
    # The more streams are idle, the less additional seconds of a stream cost other tickets.
    return whole_s - part_s > max(_COST_OF_IDLE, load) * (all_s - whole_s)


def _least_rows(cost: CostModel) -> int:
    """Return the rows of the smallest run whose fixed cost is at most `_OVERHEAD_MAX` of its time."""
    return cost.rows_of((cost.fixed_s + cost.per_request_s) / _OVERHEAD_MAX)
