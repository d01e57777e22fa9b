from __future__ import annotations

import pytest

from server.scheduling.contract import Idle, Run, WaitUntil
from server.scheduling.earliest_deadline import EarliestDeadlineFirst
from server.scheduling.lanes import Lane
from tests.server.scheduling.policies import busy, drain, exactly, on_cpu, on_gpu, policy, ticket
from tests.server.scheduling.straight_cost import StraightCost


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
    # It may wait a moment for a further ticket, or leave rows for the other stream.
    assert any(isinstance(chosen.next(now_s), Run) for now_s in (0.01, 0.02))


def test_a_ticket_alone_is_split_over_all_idle_streams_and_covers_its_rows():
    chosen = policy(streams=4)
    chosen.offer(ticket(0, rows=200), 0.0)
    pieces = [chosen.next(0.0).pieces[0] for _ in range(4)]
    assert [(p.start, p.stop) for p in pieces] == [(0, 50), (50, 100), (100, 150), (150, 200)]
    assert chosen.next(0.0) == Idle()


def test_a_ticket_whose_split_over_all_idle_streams_does_not_pay_is_split_over_fewer():
    # Over three streams, 0.66 s sooner for 8 s of streams that are idle; over two, 0.5 s sooner for 4 s.
    chosen = exactly(streams=3, fixed_s=4.0, per_request_s=0.0)
    chosen.offer(ticket(0, 99.0), 5.0)
    assert [chosen.next(5.0).pieces[0].rows for _ in range(2)] == [64, 64]


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


def test_a_cancelled_ticket_never_runs_and_an_unknown_one_is_ignored():
    chosen = policy(streams=2)
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


@pytest.mark.parametrize(("came", "large", "leaves"), [(3, 1, True), (2, 1, False), (4, 2, False), (5, 2, True)])
def test_large_tickets_run_in_pieces_and_leave_a_stream_to_smaller_ones_only_if_these_come_often(came, large, leaves):
    # A piece takes 1/32 s, a small ticket 1/16 s, a large one 2 s: whoever comes during a piece is late by a quarter of
    # its own time, and each large one by 1/64 without it.
    chosen = exactly(streams=2, fixed_s=0.0, per_request_s=0.0, per_row_s=1 / 1024)
    for number in range(came):
        chosen.offer(ticket(number, 1e9, rows=64), 5.0)
        chosen.cancel(ticket(number, 1e9, rows=64))
    for number in range(large):
        chosen.offer(ticket(100 + number, 1e9, rows=2048, lane="bulk"), 5.0)
    assert chosen.next(5.0).pieces[0].rows == 32
    following = chosen.next(5.0)
    assert following == Idle() if leaves else following.pieces[0].rows == 32
    if leaves:
        chosen.offer(ticket(200, 99.0, rows=64), 5.0)
        assert chosen.next(5.0).pieces[0].ticket.number == 200


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
