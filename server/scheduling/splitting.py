"""How many rows of a ticket the next run takes: pure functions of sizes and predicted seconds."""

from __future__ import annotations

import math

from server.scheduling.cost import CostModel

#: A ticket with more than this many times the rows of a typical one is large.
_LARGE = 2
#: What a second of a stream is worth while all are idle, against a second of an answer.
_COST_OF_IDLE = 0.1
#: A piece of a large ticket runs long enough that what every run costs is at most this part of it.
_OVERHEAD_MAX = 0.2


def is_large(rows: int, typical_rows: float) -> bool:
    """Tell whether a ticket is much larger than a typical one; none is where there is no typical one (NaN, inf)."""
    return rows > _LARGE * typical_rows


def streams_left_idle(rows: int, typical_rows: float) -> int:
    """Return how many streams must stay idle as a ticket is split, for whatever else needs a processor.

    Args:
        rows: of the whole ticket.
        typical_rows: of its own lane's tickets; NaN where it had none.
    """
    return int(rows <= _LARGE * typical_rows)


def rows_a_stream(rows: int, streams: int, left_idle: int) -> int:
    """Return the rows of the largest piece when a ticket is split over all streams that it may take."""
    return math.ceil(rows / max(1, streams - left_idle))


def large_piece_rows(rows: int, typical_rows_of_others: float, cost: CostModel) -> int:
    """Return the rows of the next piece of a large ticket: short, so that the others soon get a stream."""
    piece = math.ceil(max(typical_rows_of_others / 2, _least_rows(cost)))
    if piece < rows < 2 * piece:
        # The last two pieces alike, rather than a small one that costs a whole run.
        return math.ceil(rows / 2)
    return min(rows, piece)


def part_rows(rows: int, usable: int, needed: int, next_free_s: float | None, cost: CostModel) -> int:
    """Return the rows of a part such that all parts of a ticket end together.

    Args:
        rows: that are in no run yet.
        usable: idle streams that the ticket may take.
        needed: idle streams that other tickets need.
        next_free_s: seconds until a busy stream is predicted to be free; None where none is busy or others wait for it.
        cost: of the ticket's model.
    """
    if usable - needed > 1:
        return math.ceil(rows / (usable - needed))
    if usable <= 0 or next_free_s is None:
        return rows
    # What is left can start on the next stream that is free.
    half = (rows + 1) // 2
    per_row_s = (cost.predict_s(1, rows) - cost.predict_s(1, half)) / max(1, rows // 2)
    return min(rows, math.ceil((rows + next_free_s / per_row_s) / 2)) if per_row_s > 0 else rows


def splitting_pays(rows: int, part: int, load: float, cost: CostModel) -> bool:
    """Tell whether the answer gains more from an additional run than the streams lose by it.

    Args:
        rows: that are in no run yet.
        part: rows of the first of two runs.
        load: the part of the streams' recent time that was used.
        cost: of the ticket's model.
    """
    whole_s, part_s, other_s = (cost.predict_s(1, some) for some in (rows, part, rows - part))
    # Additional seconds of a stream cost others the less, the more streams are idle anyway.
    return whole_s - part_s > max(_COST_OF_IDLE, load) * (part_s + other_s - whole_s)


def _least_rows(cost: CostModel) -> int:
    """Return the rows of about the smallest run of which the fixed cost is no more than `_OVERHEAD_MAX`."""
    empty_s, rows = cost.fixed_s + cost.per_request_s, 1
    while cost.predict_s(1, rows) * _OVERHEAD_MAX < empty_s and rows < 1 << 20:
        rows += rows // 2 + 1
    return rows
