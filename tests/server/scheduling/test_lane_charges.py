from __future__ import annotations

import pytest

from server.scheduling.lanes import Lane
from tests.server.scheduling.policies import exactly, ticket


def test_a_lane_is_charged_what_a_run_took_and_not_what_was_predicted():
    chosen = exactly(lanes={"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)})
    for number, lane in ((0, "ads"), (1, "ads"), (2, "home")):
        chosen.offer(ticket(number, 1e9, model=number, lane=lane), 5.0)
    run = chosen.next(5.0)
    assert run.pieces[0].ticket.lane == "ads"
    chosen.finished(run, 5.25)  # 2 s were predicted: they would have been beyond its share
    assert chosen.next(5.25).pieces[0].ticket.number == 1
    late = exactly(
        lanes={"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)},
        fixed_s=0.0,
        per_request_s=0.0,
        per_row_s=1 / 1024,
    )
    for number, lane in ((0, "ads"), (1, "ads"), (2, "home")):
        late.offer(ticket(number, 1e9, model=number, lane=lane), 5.0)
    run = late.next(5.0)
    late.finished(run, 6.0)
    assert late.next(6.0).pieces[0].ticket.number == 2


@pytest.mark.parametrize(
    ("rows", "joined", "first"),
    [
        pytest.param(8, 8, "home", id="half of the run is more than its share"),
        pytest.param(5, 10, "ads", id="a third is not"),
    ],
)
def test_each_lane_of_a_joined_run_is_charged_for_its_rows(rows, joined, first):
    chosen = exactly(lanes={"ads": Lane(priority=1, share=0.15), "home": Lane(share=0.85)}, careful=1.0)
    chosen.offer(ticket(0, 1e9, rows=rows, lane="ads"), 5.0)
    chosen.offer(ticket(1, 1e9, rows=joined, lane="home"), 5.0)
    run = chosen.next(5.0)
    assert [piece.ticket.number for piece in run.pieces] == [0, 1]
    for number, lane in ((2, "ads"), (3, "home")):
        chosen.offer(ticket(number, 1e9, model=number, lane=lane), 5.0)
    ends_s = 5.0 + 1.25 + (rows + joined) / 128
    chosen.finished(run, ends_s)  # exactly as predicted: nothing is corrected at the end
    assert chosen.next(ends_s).pieces[0].ticket.lane == first


def test_while_it_runs_a_lane_is_charged_what_was_predicted():
    lanes = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)}
    chosen = exactly(streams=2, lanes=lanes, careful=1.0)
    for number, lane in ((0, "ads"), (1, "ads"), (2, "home")):
        chosen.offer(ticket(number, 1e9, rows=8, model=number, lane=lane), 5.0)
    assert [chosen.next(5.0).pieces[0].ticket.number for _ in range(2)] == [0, 2]


def test_a_run_that_ends_before_it_began_costs_nothing():
    lanes = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)}
    chosen = exactly(streams=2, lanes=lanes, fixed_s=0.0, per_request_s=1.25, per_row_s=0.0)
    for number, lane in ((0, "ads"), (1, "ads"), (2, "ads"), (3, "home")):
        chosen.offer(ticket(number, 1e9, model=number, lane=lane), 5.0)
    chosen.finished(chosen.next(5.0), 4.5)
    assert [chosen.next(5.0).pieces[0].ticket.number for _ in range(2)] == [1, 3]
