from __future__ import annotations

from functools import partial

import pytest

from server.scheduling.contract import Expire, Forecast, Idle, Run, Ticket, WaitUntil
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from server.scheduling.lanes import Lane
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


def test_nothing_offered_is_idle():
    assert policy().next(0.0) == Idle()


def test_the_earliest_deadline_runs_first_and_equal_ones_in_order_of_arrival():
    chosen = policy()
    for number, deadline_s in ((0, 9.0), (1, 3.0), (2, 3.0), (3, 5.0)):
        chosen.offer(ticket(number, deadline_s), 0.0)
    assert drain(chosen) == [[(1, 128)], [(2, 128)], [(3, 128)], [(0, 128)]]


def test_a_reserved_ticket_runs_only_when_its_rows_are_ready():
    chosen = policy()
    chosen.reserve(ticket(0), 0.0)
    assert chosen.next(0.0) == Idle()
    chosen.offer(ticket(0), 0.1)
    assert drain(chosen, 0.1) == [[(0, 128)]]


def test_no_more_runs_are_out_than_streams():
    chosen = policy(streams=2)
    for number in range(3):
        chosen.offer(ticket(number), 0.0)
    first, second = chosen.next(0.0), chosen.next(0.0)
    assert isinstance(first, Run)
    assert isinstance(second, Run)
    assert chosen.next(0.0) == Idle()
    chosen.finished(first, 0.01)
    chosen.next(0.01)  # may wait a moment for a further ticket
    assert isinstance(chosen.next(0.02), Run)


def test_a_ticket_alone_is_split_over_idle_streams_but_one_and_covers_its_rows():
    chosen = policy(streams=5)
    chosen.offer(ticket(0, rows=200), 0.0)
    pieces = [chosen.next(0.0).pieces[0] for _ in range(4)]
    assert [(p.start, p.stop) for p in pieces] == [(0, 50), (50, 100), (100, 150), (150, 200)]
    assert chosen.next(0.0) == Idle()


def test_a_ticket_much_larger_than_its_lanes_others_takes_all_idle_streams():
    chosen = policy(streams=2)
    chosen.offer(ticket(0, rows=200), 0.0)
    assert drain(chosen) == [[(0, 200)]]
    chosen.offer(ticket(1, rows=1000), 0.0)
    assert [chosen.next(0.0).pieces[0].rows for _ in range(2)] == [500, 500]


def test_a_tiny_ticket_is_not_split_under_load():
    chosen = policy(streams=2)
    for number in range(400):  # busy for the last second
        chosen.offer(ticket(number, 1e9), number / 200)
        for run in [chosen.next(number / 200), chosen.next(number / 200)]:
            if isinstance(run, Run):
                chosen.finished(run, number / 200 + 9e-3)
    chosen.offer(ticket(1000, 1e9, rows=8), 2.0)
    assert chosen.next(2.0).pieces[0].rows == 8


def test_in_a_backlog_tickets_run_whole():
    chosen = policy(streams=2)
    for number in range(4):
        chosen.offer(ticket(number, number + 1.0), 0.0)
    assert drain(chosen)[:2] == [[(0, 128)], [(1, 128)]]


def test_the_rest_of_a_split_waits_for_the_stream_that_is_free_soon():
    chosen = policy(streams=2)
    chosen.offer(ticket(0, 9.0, rows=64), 0.0)
    chosen.offer(ticket(1, 9.0, rows=64), 0.9)
    first, second = chosen.next(1.0), chosen.next(1.0)
    assert (first.pieces[0].ticket.number, second.pieces[0].ticket.number) == (0, 1)
    chosen.finished(first, 1.001)
    chosen.offer(ticket(2, 9.0, rows=512), 1.001)  # much more than its lane's others
    part = chosen.next(1.001).pieces[0]
    # The other stream has 1.6 ms to go, 47 rows' worth: both end together if this one takes about 24 more than half.
    assert 270 <= part.rows <= 300


def test_small_requests_share_a_run_and_large_ones_do_not_on_a_cpu():
    chosen = policy(on_cpu)
    for number in range(3):
        chosen.offer(ticket(number, rows=1), 0.0)
    assert drain(chosen) == [[(0, 1), (1, 1), (2, 1)]]
    for number in range(3):
        chosen.offer(ticket(number, rows=128), 0.0)
    assert drain(chosen) == [[(0, 128)], [(1, 128)], [(2, 128)]]


def test_many_requests_share_a_run_where_a_run_costs_more_than_rows():
    chosen = policy(on_gpu)
    for number in range(16):
        chosen.offer(ticket(number), 0.0)
    assert len(drain(chosen)) == 1


def test_a_run_never_mixes_models_and_joining_makes_no_member_late():
    chosen = policy(on_gpu)
    for number, model in enumerate("aabba"):
        chosen.offer(ticket(number, number + 1.0, model=model), 0.0)
    assert [[n for n, _ in run] for run in drain(chosen)] == [[0, 1], [2, 3], [4]]
    tight = on_gpu(1, 128) * 1.3
    chosen.offer(ticket(10, tight), 0.0)
    chosen.offer(ticket(11, 1.0, rows=100_000), 0.0)
    assert [[n for n, _ in run] for run in drain(chosen)] == [[10], [11]]


def busy(chosen, gap_s, runs=200):
    """Let tickets arrive at an even pace; when the next one is due."""
    now_s = 0.0
    for number in range(runs):
        now_s = number * gap_s
        chosen.offer(ticket(number, 1e9), now_s)
        drain(chosen, now_s)
    return now_s + gap_s


def test_it_waits_for_company_that_comes_sooner_than_what_it_saves_and_only_once():
    chosen = policy(on_gpu, streams=2)
    now_s = busy(chosen, gap_s=0.2e-3)
    chosen.offer(ticket(1000, 1e9), now_s)
    decision = chosen.next(now_s)
    assert isinstance(decision, WaitUntil)
    assert now_s < decision.time_s <= now_s + 2e-3
    assert chosen.next(now_s + 1e-4) == decision
    assert isinstance(chosen.next(decision.time_s), Run)


def test_it_does_not_wait_where_a_bigger_batch_buys_nothing():
    chosen = policy(on_cpu, streams=2)
    now_s = busy(chosen, gap_s=3e-3)
    chosen.offer(ticket(1000, 1e9), now_s)
    assert isinstance(chosen.next(now_s), Run)


def test_it_does_not_wait_beyond_what_the_deadline_allows():
    chosen = policy(on_gpu, streams=2)
    now_s = busy(chosen, gap_s=0.2e-3)
    chosen.offer(ticket(1000, now_s + 3e-3), now_s)
    decision = chosen.next(now_s)
    latest_s = now_s + 3e-3 - on_gpu(2, 256)
    assert isinstance(decision, Run) or decision.time_s <= latest_s


def test_expired_tickets_come_back_before_anything_runs():
    chosen = policy()
    early, late = ticket(0, 1.0), ticket(1, 5.0)
    chosen.offer(early, 0.0)
    chosen.offer(late, 0.0)
    assert chosen.next(1.0) == Expire((early,))
    assert drain(chosen, 1.0) == [[(1, 128)]]


def test_what_would_end_late_expires_before_it_costs_the_others_their_time():
    chosen = policy()
    hopeless, fine = ticket(0, 0.003), ticket(1, 1.0)
    chosen.offer(hopeless, 0.0)
    chosen.offer(fine, 0.0)
    assert chosen.next(0.0) == Expire((hopeless,))
    assert drain(chosen) == [[(1, 128)]]


def test_alone_a_ticket_is_tried_until_its_deadline_whatever_the_prediction():
    chosen = policy()
    chosen.offer(ticket(0, 0.001), 0.0)
    assert isinstance(chosen.next(0.0005), Run)


def test_a_cancelled_ticket_never_runs_and_an_unknown_one_is_ignored():
    chosen = policy(streams=3)
    chosen.offer(ticket(0, rows=1000), 0.0)
    run = chosen.next(0.0)
    assert run.pieces[0].rows == 500
    chosen.cancel(ticket(0, rows=1000))
    assert chosen.next(0.0) == Idle()
    chosen.cancel(ticket(77))
    chosen.finished(run, 0.1)
    assert len(chosen) == 0


def test_offering_twice_is_a_fault():
    chosen = policy()
    chosen.offer(ticket(0), 0.0)
    with pytest.raises(ValueError, match="ticket 0"):
        chosen.offer(ticket(0), 0.0)


def test_priority_goes_first_within_its_share_and_not_beyond_it():
    chosen = policy(lanes={"ads": Lane(priority=1, share=0.2), "home": Lane(share=0.8)})
    numbers, used = iter(range(10_000)), {"ads": 0, "home": 0}
    now_s, order = 0.0, []
    for lane in ("ads", "home") * 500:
        chosen.offer(ticket(next(numbers), 1e9, lane=lane), 0.0)
    while now_s < 3.0:
        run = chosen.next(now_s)
        now_s += on_cpu(len(run.pieces), sum(piece.rows for piece in run.pieces))
        chosen.finished(run, now_s)
        order.append(run.pieces[0].ticket.lane)
        used[order[-1]] += now_s > 1.0
    assert order[0] == "ads"
    assert used["ads"] / sum(used.values()) == pytest.approx(0.2, abs=0.04)


def test_a_lane_beyond_its_share_takes_what_is_left():
    chosen = policy(lanes={"ads": Lane(share=0.01), "home": Lane()})
    for number in range(100):
        chosen.offer(ticket(number, 1e9, lane="ads"), 0.0)
    assert sum(len(run) for run in drain(chosen)) == 100


def test_a_large_ticket_runs_in_pieces_and_leaves_a_stream_to_smaller_lanes():
    chosen = policy(streams=2)
    chosen.offer(ticket(0, 1e9, rows=64), 0.0)
    drained = chosen.next(0.0), chosen.next(0.0)
    for run in drained:
        if isinstance(run, Run):
            chosen.finished(run, 0.001)
    chosen.offer(ticket(1, 1e9, rows=2000, lane="bulk"), 0.002)
    first = chosen.next(0.002)
    assert first.pieces[0].rows <= 64
    assert chosen.next(0.002) == Idle()
    chosen.offer(ticket(2, 0.1, rows=64), 0.003)
    assert chosen.next(0.003).pieces[0].ticket.number == 2


def test_a_forecast_counts_what_runs_and_waits_before_and_whom_it_harms():
    chosen = policy()
    alone = chosen.forecast(ticket(0, 1.0), 0.0)
    assert on_cpu(1, 128) <= alone.finish_s < 1.5 * on_cpu(1, 128)
    for number in range(3):
        chosen.offer(ticket(number, 0.5), 0.0)
    chosen.next(0.0)
    after = chosen.forecast(ticket(9, 1.0), 0.0)
    assert after.finish_s == pytest.approx(alone.finish_s + 3 * on_cpu(1, 128), rel=0.1)
    assert after.harms == 0
    chosen.offer(ticket(5, 4.5 * on_cpu(1, 128), rows=128), 0.0)
    assert chosen.forecast(ticket(9, 0.001, rows=512), 0.0).harms == 1
    assert len(chosen) == 3  # a forecast leaves nothing behind


def exactly(streams=1, lanes=None, **cost):
    """A policy with exact costs: by default 1 s a run and 1 s for each 128 rows, and promises twice that."""
    model = StraightCost(**{"fixed_s": 0.75, "per_request_s": 0.25, "per_row_s": 1 / 128, "careful": 2.0} | cost)
    return EarliestDeadlineFirst(streams, lambda _: model, lanes)


def test_a_forecast_without_anything_before_it_is_a_typical_run_over_the_streams_that_it_may_take():
    chosen = exactly(streams=3)
    assert chosen.forecast(ticket(0, 99.0), 5.0) == Forecast(7.0 - 1 + 43 / 128, 0), "the first of its lane: all three"
    chosen.offer(ticket(0, 99.0), 5.0)
    chosen.next(5.0)
    chosen.cancel(ticket(0))
    # One stream is left idle; of 43 rows, 1.34 s, a third counts for each stream.
    work_s = 1 + 64 / 128
    assert chosen.forecast(ticket(1, 99.0), 5.0).finish_s == pytest.approx(5.0 + work_s / 3 + 1 + 64 / 128)


def test_a_forecast_behind_others_is_a_careful_promise():
    chosen = exactly(streams=2)
    chosen.reserve(ticket(0, 50.0), 5.0)
    assert chosen.forecast(ticket(1, 99.0), 5.0) == Forecast(5.0 + 2 / 2 + 2 * 2, 0)
    # Before the other there is nothing.
    assert chosen.forecast(ticket(1, 40.0), 5.0) == Forecast(5.0 + 2.0, 0)


def test_a_forecast_while_every_stream_is_busy_is_a_careful_promise():
    chosen = exactly(streams=1)
    chosen.offer(ticket(0, 50.0), 5.0)
    run = chosen.next(5.0)
    assert chosen.running == 1
    assert chosen.forecast(ticket(1, 99.0), 5.5) == Forecast(5.5 + 1.5 + 2 * 2, 0), "1.5 s of the run are left"
    assert chosen.forecast(ticket(1, 99.0), 9.0) == Forecast(9.0 + 2 * 2, 0), "it takes longer than was predicted"
    chosen.finished(run, 9.0)
    assert chosen.running == 0


def test_a_large_ticket_is_forecast_whole_as_it_leaves_a_stream_to_others():
    chosen = exactly(streams=2)
    chosen.offer(ticket(0, 50.0, rows=64, lane="home"), 5.0)
    chosen.cancel(ticket(0, rows=64))
    assert chosen.forecast(ticket(1, 99.0, rows=256, lane="bulk"), 5.0).finish_s == 5.0 + 3.0
    assert chosen.forecast(ticket(1, 99.0, rows=128, lane="bulk"), 5.0).finish_s == 5.0 + 1.5


@pytest.mark.parametrize(
    ("deadline_s", "harms"),
    [
        pytest.param(8.9, 0, id="late anyway"),
        pytest.param(9.0, 1, id="just in time without the newcomer"),
        pytest.param(10.9, 1, id="not in time with it"),
        pytest.param(11.0, 0, id="just in time with it"),
    ],
)
def test_a_forecast_counts_whom_the_newcomer_makes_late(deadline_s, harms):
    chosen = exactly(streams=1)
    chosen.reserve(ticket(0, deadline_s), 5.0)
    # The other is promised 4 s from now, and the newcomer takes 2 s.
    assert chosen.forecast(ticket(1, 6.0), 5.0).harms == harms


def test_each_that_waits_behind_a_newcomer_is_delayed_by_those_before_it_too():
    chosen = exactly(streams=2)
    chosen.reserve(ticket(0, 99.0), 5.0)
    chosen.reserve(ticket(1, 99.5, rows=384), 5.0)
    # Behind the first, 2 s on two streams, the second is promised 8 s: at 14 s; the newcomer costs one more.
    for deadline_s, harms in ((13.9, 0), (14.0, 1), (14.9, 1), (15.0, 0)):
        other = exactly(streams=2)
        other.reserve(ticket(0, 13.0), 5.0)
        other.reserve(ticket(1, deadline_s, rows=384), 5.0)
        assert other.forecast(ticket(9, 1.0), 5.0).harms == harms, deadline_s


def test_a_forecast_of_a_ticket_that_waits_leaves_it_in_its_place():
    chosen = exactly()
    waits = ticket(0, 99.0)
    chosen.reserve(waits, 5.0)
    chosen.forecast(waits, 5.0)
    chosen.offer(waits, 5.0)
    assert chosen.next(5.0).pieces[0].ticket == waits


@pytest.mark.parametrize(
    ("deadline_s", "expires"),
    [
        pytest.param(6.9, True, id="late on the one stream that it may take"),
        pytest.param(7.0, False, id="just in time"),
    ],
)
def test_a_ticket_expires_beside_others_when_it_cannot_end_in_time(deadline_s, expires):
    chosen = exactly(streams=2)
    for one in (ticket(0, deadline_s), ticket(1, 99.0)):
        chosen.offer(one, 5.0)
    assert (chosen.next(5.0) == Expire((ticket(0, deadline_s),))) is expires


def test_several_tickets_without_hope_expire_together_and_the_last_one_is_tried():
    chosen = exactly()
    for number in range(3):
        chosen.offer(ticket(number, 5.1), 5.0)
    assert chosen.next(5.0) == Expire((ticket(0, 5.1), ticket(1, 5.1)))
    assert chosen.next(5.0).pieces[0].ticket == ticket(2, 5.1)


def test_a_ticket_expires_at_its_deadline_exactly():
    chosen = exactly()
    chosen.offer(ticket(0, 6.0), 5.0)
    chosen.reserve(ticket(1, 6.0), 5.0)  # nobody waits for what is not ready yet: its deadline is watched elsewhere
    assert chosen.next(6.0) == Expire((ticket(0, 6.0),))
    assert chosen.next(6.0) == Idle()


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


def test_the_lane_of_the_first_ticket_is_charged_for_those_that_join_it():
    lanes = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)}
    for end_s, first in ((5.25, "ads"), (7.0, "home")):
        chosen = exactly(lanes=lanes, careful=1.0)
        chosen.offer(ticket(0, 1e9, rows=8, lane="ads"), 5.0)
        chosen.offer(ticket(1, 1e9, rows=8, lane="home"), 5.0)
        run = chosen.next(5.0)
        assert [piece.ticket.number for piece in run.pieces] == [0, 1]
        for number, lane in ((2, "ads"), (3, "home")):
            chosen.offer(ticket(number, 1e9, model=number, lane=lane), 5.0)
        chosen.finished(run, end_s)
        assert chosen.next(end_s).pieces[0].ticket.lane == first


def test_the_lane_of_the_first_ticket_is_charged_for_what_was_predicted_of_a_joined_run():
    chosen = exactly(lanes={"ads": Lane(priority=1, share=0.25), "home": Lane(share=0.75)}, careful=1.0)
    chosen.offer(ticket(0, 1e9, rows=8, lane="ads"), 5.0)
    chosen.offer(ticket(1, 1e9, rows=8, lane="home"), 5.0)
    run = chosen.next(5.0)
    assert [piece.ticket.number for piece in run.pieces] == [0, 1]
    for number, lane in ((2, "ads"), (3, "home")):
        chosen.offer(ticket(number, 1e9, model=number, lane=lane), 5.0)
    chosen.finished(run, 6.375)  # exactly as predicted: nothing is corrected at the end
    assert chosen.next(6.375).pieces[0].ticket.lane == "home", "the other lane is beyond its share"


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


def test_what_is_left_of_a_split_waits_for_the_stream_that_is_free_first():
    costs = {
        "slow": StraightCost(fixed_s=8.0, per_row_s=1 / 128),
        "a": StraightCost(fixed_s=1.0, per_row_s=1 / 128),
    }
    chosen = EarliestDeadlineFirst(3, costs.__getitem__)
    chosen.offer(ticket(0, 50.0, model="slow"), 5.0)
    chosen.offer(ticket(1, 51.0), 5.0)
    assert [chosen.next(5.0).pieces[0].rows for _ in range(2)] == [128, 128]
    chosen.offer(ticket(2, 99.0, rows=1000), 6.75)  # much more than its lane's others
    # A quarter of a second, 32 rows, is left of one run, and 7.25 s of the other.
    assert chosen.next(6.75).pieces[0].rows == 516


@pytest.mark.parametrize(
    ("fixed_s", "rows"),
    [
        pytest.param(4.0, 64, id="half a second sooner, for 4 s of streams that are idle"),
        pytest.param(6.0, 128, id="half a second sooner, for 6 s"),
    ],
)
def test_a_ticket_is_split_only_where_that_pays(fixed_s, rows):
    chosen = exactly(streams=3, fixed_s=fixed_s, per_request_s=0.0)
    chosen.offer(ticket(0, 99.0), 5.0)
    assert chosen.next(5.0).pieces[0].rows == rows


def test_a_large_ticket_leaves_the_last_stream_to_a_smaller_one_behind_it():
    # It is within its share, of a higher priority and due sooner.
    lanes = {"bulk": Lane(priority=5, share=1000.0)}
    chosen = exactly(streams=2, lanes=lanes, fixed_s=0.0, per_request_s=0.0, per_row_s=1 / 8192)
    chosen.offer(ticket(0, 90.0, rows=1000, lane="bulk"), 5.0)
    chosen.offer(ticket(1, 99.0, rows=64), 5.0)
    assert chosen.next(5.0).pieces[0].ticket.number == 0
    assert chosen.next(5.0).pieces[0].ticket.number == 1
    alone = exactly(streams=1)
    alone.offer(ticket(0, 90.0, rows=1000, lane="bulk"), 5.0)
    alone.reserve(ticket(1, 99.0, rows=64), 5.0)
    assert alone.next(5.0).pieces[0].ticket.number == 0, "there is no other stream"


def test_what_is_left_of_a_ticket_joins_no_run():
    chosen = exactly(streams=2, careful=1.0)
    chosen.offer(ticket(0, 60.0, rows=8), 5.0)
    first = chosen.next(5.0)
    chosen.offer(ticket(1, 60.0, rows=1000), 5.0)
    assert 500 <= chosen.next(5.0).pieces[0].rows < 600
    chosen.finished(first, 6.0)
    chosen.offer(ticket(2, 50.0, rows=8), 6.0)
    chosen.offer(ticket(3, 70.0, rows=8), 6.0)
    assert [piece.ticket.number for piece in chosen.next(6.0).pieces] == [2]


def test_a_large_ticket_joins_no_run():
    chosen = exactly(careful=1.0)
    for number, rows, lane in ((0, 8, "home"), (1, 24, "bulk"), (2, 8, "home")):
        chosen.offer(ticket(number, 50.0 + number, rows=rows, lane=lane), 6.0)
    assert [piece.ticket.number for piece in chosen.next(6.0).pieces] == [0]


def test_what_joins_is_a_whole_ticket_and_pieces_say_their_rows():
    chosen = exactly(careful=1.0)
    for number in range(3):
        chosen.offer(ticket(number, 50.0 + number, rows=8), 5.0)
    run = chosen.next(5.0)
    assert [(piece.ticket.number, piece.start, piece.stop) for piece in run.pieces] == [(0, 0, 8), (1, 0, 8), (2, 0, 8)]
    assert len(chosen) == 0


def test_no_more_joins_while_another_stream_is_idle():
    chosen = exactly(streams=2, careful=1.0)
    for number in range(3):
        chosen.offer(ticket(number, 50.0 + number, rows=8), 5.0)
    assert [[p.ticket.number for p in chosen.next(5.0).pieces] for _ in range(2)] == [[0], [1, 2]]


def test_what_was_learned_of_a_model_is_forgotten():
    chosen = exactly(streams=2, careful=1.0)
    for number, now_s in enumerate((1.0, 1.1)):
        chosen.offer(ticket(number, 1e9), now_s)
        chosen.cancel(ticket(number))
    chosen.forget("a")
    chosen.forget("unknown")
    chosen.offer(ticket(2, 1e9), 1.2)
    assert isinstance(chosen.next(1.2), Run), "it is the first again: there is nothing to wait for"


def test_reserving_twice_is_a_fault():
    chosen = exactly()
    chosen.reserve(ticket(0), 0.0)
    with pytest.raises(ValueError, match="ticket 0 was already reserved or offered"):
        chosen.reserve(ticket(0), 0.0)


def test_a_run_that_is_not_out_cannot_finish():
    chosen = exactly()
    chosen.offer(ticket(0), 0.0)
    run = chosen.next(0.0)
    chosen.finished(run, 1.0)
    with pytest.raises(KeyError):
        chosen.finished(run, 1.0)
