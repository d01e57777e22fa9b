"""Batch policies with known costs, tickets for them, and ways to run them to the end."""

from __future__ import annotations

from functools import partial

from server.scheduling.contract import Idle, Ticket, WaitUntil
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from tests.server.scheduling.straight_cost import StraightCost


def on_cpu(requests, rows):
    """A row costs the same in any batch."""
    return 0.3e-3 + 0.05e-3 * requests + 35e-6 * rows


def on_gpu(requests, rows):
    """A run costs a lot, a row next to nothing."""
    return 2e-3 + 4e-7 * rows + 1e-9 * requests


def policy(cost=on_cpu, streams=1, lanes=None):
    model = CostModel(partial(cost, 1))
    for _ in range(200):  # so that it knows what requests of one run share
        for requests, rows in ((1, 64), (3, 192)):
            model.observe(requests, rows, cost(requests, rows))
    return EarliestDeadlineFirst(streams, lambda _: model, lanes)


def exactly(streams=1, lanes=None, **cost):
    """A policy with exact costs: by default 1 s a run and 1 s for each 128 rows, and promises twice that."""
    model = StraightCost(**{"fixed_s": 0.75, "per_request_s": 0.25, "per_row_s": 1 / 128, "careful": 2.0} | cost)
    return EarliestDeadlineFirst(streams, lambda _: model, lanes)


def ticket(number, deadline_s=1.0, rows=128, model="a", lane="home"):
    return Ticket(number, rows, deadline_s, model, lane)


def drain(chosen, now_s=0.0):
    """Run everything one after the other; what ran, as (ticket, rows) pairs by run."""
    runs = []
    while (decision := chosen.next(now_s)) != Idle():
        if isinstance(decision, WaitUntil):
            now_s = decision.time_s
            continue
        runs.append([(piece.ticket.number, piece.rows) for piece in decision.pieces])
        chosen.finished(decision, now_s)
    return runs


def busy(chosen, gap_s, runs=200):
    """Let tickets arrive at an even pace; when the next one is due."""
    now_s = 0.0
    for number in range(runs):
        now_s = number * gap_s
        chosen.offer(ticket(number, 1e9), now_s)
        drain(chosen, now_s)
    return now_s + gap_s
