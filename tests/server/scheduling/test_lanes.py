from __future__ import annotations

import math

import numpy as np
import pytest

from server.scheduling.contract import Ticket
from server.scheduling.lanes import Lane, Lanes, WaitingTicket


def ticket(number, lane="home", deadline_s=10.0, rows=128, caller=""):
    return Ticket(number, rows, deadline_s, "m", lane, caller)


def lanes_with(*tickets, lanes=None, streams=1, now_s=0.0, callers=None):
    lanes = Lanes(lanes or {}, streams, callers and callers.__getitem__)
    for one in tickets:
        lanes.add(WaitingTicket(one), now_s)
    return lanes


def numbers(waiting):
    return [one.ticket.number for one in waiting]


def test_the_earlier_deadline_goes_first_and_equal_ones_in_order_of_arrival():
    lanes = lanes_with(
        ticket(3, deadline_s=5.0), ticket(2, "ads", 4.0), ticket(1, deadline_s=5.0), ticket(0, "ads", 6.0)
    )
    assert numbers(lanes.ordered(0.0)) == [2, 1, 3, 0]


def test_the_higher_priority_goes_before_the_earlier_deadline():
    some = {"ads": Lane(priority=1), "bulk": Lane(priority=-1)}
    lanes = lanes_with(ticket(0, "bulk", 1.0), ticket(1, "home", 2.0), ticket(2, "ads", 3.0), lanes=some)
    assert numbers(lanes.ordered(0.0)) == [2, 1, 0]


@pytest.mark.parametrize(
    ("used_s", "streams", "now_s", "first"),
    [
        pytest.param(0.25, 1, 0.0, "ads", id="its share exactly"),
        pytest.param(0.26, 1, 0.0, "home", id="more than its share"),
        pytest.param(0.5, 2, 0.0, "ads", id="its share of two streams"),
        pytest.param(0.51, 2, 0.0, "home", id="more than its share of two streams"),
        pytest.param(0.5, 1, 0.69, "home", id="half of it is not yet forgotten"),
        pytest.param(0.5, 1, 0.70, "ads", id="half of it is forgotten after the logarithm of two seconds"),
    ],
)
def test_a_lane_beyond_its_share_goes_last_whatever_its_priority(used_s, streams, now_s, first):
    some = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=1.5)}
    lanes = lanes_with(ticket(0, "ads"), ticket(1, "home"), lanes=some, streams=streams)
    lanes.charge(ticket(-1, "ads"), used_s, 0.0)
    assert lanes.ordered(now_s)[0].ticket.lane == first


def test_shares_count_against_those_of_lanes_with_work_only():
    some = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5), "bulk": Lane(share=9.0)}
    lanes = lanes_with(ticket(0, "ads"), ticket(1, "home"), lanes=some)
    lanes.charge(ticket(-1, "ads"), 0.4, 0.0)
    assert numbers(lanes.ordered(0.0)) == [0, 1]
    lanes.add(WaitingTicket(ticket(2, "bulk")), 0.0)
    assert numbers(lanes.ordered(0.0)) == [1, 2, 0]


def test_alone_a_lane_is_never_beyond_its_share():
    lanes = lanes_with(ticket(0), ticket(1, deadline_s=9.0))
    lanes.charge(ticket(-1, "home"), 1e9, 0.0)
    assert lanes.around(ticket(2, deadline_s=9.5), 0.0)[0][0].ticket.number == 1
    assert numbers(lanes.ordered(0.0)) == [1, 0]


def test_what_was_charged_too_much_is_given_back():
    some = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)}
    lanes = lanes_with(ticket(0, "ads"), ticket(1, "home"), lanes=some)
    lanes.charge(ticket(-1, "ads"), 2.0, 0.0)
    lanes.charge(ticket(-1, "ads"), -1.6, 0.0)
    assert numbers(lanes.ordered(0.0)) == [0, 1]


def test_what_is_removed_is_gone_and_what_looks_like_it_stays():
    lanes = Lanes({}, 1)
    one, other = WaitingTicket(ticket(0)), WaitingTicket(ticket(0))
    lanes.add(one, 0.0)
    lanes.add(other, 0.0)
    lanes.remove(other)
    assert lanes.ordered(0.0)[0] is one


def test_a_newcomer_has_a_place_between_those_that_wait_and_is_not_put_in():
    some = {"ads": Lane(priority=1), "bulk": Lane(priority=-1)}
    lanes = lanes_with(
        ticket(0, "bulk", 1.0), ticket(1, "home", 2.0), ticket(2, "ads", 9.0), ticket(3, "home", 4.0), lanes=some
    )
    before, behind = lanes.around(ticket(4, "home", 3.0), 0.0)
    assert (numbers(before), numbers(behind)) == ([2, 1], [3, 0])
    before, behind = lanes.around(ticket(1, "home", 2.0), 0.0)  # one that waits already goes behind itself
    assert (numbers(before), numbers(behind)) == ([2, 1], [3, 0])
    before, behind = lanes.around(ticket(4, "ads", 3.0), 0.0)
    assert (numbers(before), numbers(behind)) == ([], [2, 1, 3, 0])
    before, behind = lanes.around(ticket(4, "new", 3.0), 0.0)
    assert (numbers(before), numbers(behind)) == ([2, 1], [3, 0])
    assert numbers(lanes.ordered(0.0)) == [2, 1, 3, 0]


def test_a_newcomer_ranks_with_its_lane_although_nothing_else_of_it_waits():
    some = {"ads": Lane(priority=1, share=0.5), "home": Lane(share=0.5)}
    lanes = lanes_with(ticket(0, "home"), lanes=some)
    assert lanes.around(ticket(1, "ads"), 0.0)[0] == []
    lanes.charge(ticket(-1, "ads"), 0.51, 0.0)
    assert numbers(lanes.around(ticket(1, "ads"), 0.0)[0]) == [0]


def test_who_is_beyond_its_share_has_no_claim_to_be_in_time_against_who_is_within():
    lanes = lanes_with(ticket(0, "ads", 20.0), ticket(1, "home", 20.0))
    lanes.charge(ticket(-1, "ads"), 5.0, 0.0)
    assert numbers(lanes.around(ticket(2, "home"), 0.0)[1]) == [1]
    assert numbers(lanes.around(ticket(2, "ads"), 0.0)[1]) == [0]


def test_a_typical_ticket_is_a_mean_that_forgets():
    lanes = lanes_with(ticket(0, rows=100))
    assert lanes.typical_rows_of_others(ticket(-1, "ads"), 0.0) == 100
    lanes.add(WaitingTicket(ticket(1, rows=200)), 0.0)
    assert lanes.typical_rows_of_others(ticket(-1, "ads"), 0.0) == pytest.approx(110)
    assert math.isinf(lanes.typical_rows_of_others(ticket(-1, "home"), 0.0))


def test_the_smallest_typical_ticket_of_the_other_lanes_at_work_counts():
    lanes = lanes_with(ticket(0, "home", rows=1), ticket(1, "ads", rows=64), ticket(2, "bulk", rows=500))
    assert lanes.typical_rows_of_others(ticket(-1, "home"), 0.0) == 64
    assert lanes.typical_rows_of_others(ticket(-1, "new"), 0.0) == 1
    assert Lanes({"ads": Lane()}, 1).typical_rows_of_others(ticket(-1, "home"), 0.0) == math.inf


@pytest.mark.parametrize(
    ("now_s", "rows"),
    [
        pytest.param(5.9, 64, id="the last ticket came less than a second ago"),
        pytest.param(6.0, math.inf, id="it came a second ago"),
    ],
)
def test_a_lane_is_at_work_for_a_second_after_its_last_ticket(now_s, rows):
    lanes, ads = Lanes({}, 1), WaitingTicket(ticket(0, "ads", rows=64))
    lanes.add(ads, 5.0)
    assert lanes.typical_rows_of_others(ticket(-1, "home"), 99.0) == 64, "it waits"
    lanes.remove(ads)
    assert lanes.typical_rows_of_others(ticket(-1, "home"), now_s) == rows


def test_the_load_is_the_part_of_the_streams_recent_time_that_was_used():
    lanes = Lanes({}, 2)
    assert lanes.load(0.0) == 0.0
    lanes.charge(ticket(-1, "home"), 0.5, 0.0)
    lanes.charge(ticket(-1, "ads"), 0.25, 0.0)
    assert lanes.load(0.0) == 0.375
    assert lanes.load(1.0) == pytest.approx(0.375 / math.e)


def test_a_lane_that_is_not_configured_has_priority_zero_and_a_share_of_one():
    lanes = lanes_with(ticket(0, "new"), ticket(1, "home"), lanes={"home": Lane(priority=0, share=3.0)}, streams=4)
    lanes.charge(ticket(-1, "new"), 1.0, 0.0)
    assert numbers(lanes.ordered(0.0)) == [0, 1]
    lanes.charge(ticket(-1, "new"), 0.01, 0.0)
    assert numbers(lanes.ordered(0.0)) == [1, 0]


def test_a_ticket_that_waits_has_all_its_rows_to_go_and_is_not_ready():
    waiting = WaitingTicket(ticket(0))
    assert (waiting.rows, waiting.ready, waiting.wait_until_s) == (128, False, None)
    waiting.take(100)
    assert (waiting.start, waiting.rows) == (100, 28)


def test_a_caller_beyond_its_share_of_a_lane_goes_behind_the_others_of_the_lane():
    lanes = lanes_with(ticket(0, caller="greedy", deadline_s=1.0), ticket(1, caller="modest", deadline_s=2.0))
    lanes.charge(ticket(-1, caller="greedy"), 0.5, 0.0)
    assert numbers(lanes.ordered(0.0)) == [0, 1], "half of one stream is its share"
    lanes.charge(ticket(-1, caller="greedy"), 0.01, 0.0)
    assert numbers(lanes.ordered(0.0)) == [1, 0]
    lanes.add(WaitingTicket(ticket(2, "ads", 3.0, caller="greedy")), 0.0)
    assert numbers(lanes.ordered(0.0)) == [2, 1, 0], "its use of one lane does not count in another"


def test_callers_share_what_their_lane_gets():
    some = {"ads": Lane(share=1.0), "home": Lane(share=3.0)}
    lanes = lanes_with(ticket(0, "ads", caller="a"), ticket(1, "ads", caller="b"), ticket(2, "home"), lanes=some)
    lanes.charge(ticket(-1, "ads", caller="a"), 0.13, 0.0)
    assert numbers(lanes.ordered(0.0)) == [1, 2, 0], "more than half of a quarter"
    lanes.charge(ticket(-1, "ads", caller="b"), 0.121, 0.0)
    assert numbers(lanes.ordered(0.0)) == [2, 1, 0], "together more than a quarter"


def test_a_callers_share_and_priority_are_those_of_its_claim():
    claims = {"batch": Lane(priority=-1), "feed": Lane(share=3.0), "": Lane()}
    lanes = lanes_with(
        ticket(0, caller="batch", deadline_s=1.0), ticket(1, caller="feed", deadline_s=2.0), callers=claims
    )
    assert numbers(lanes.ordered(0.0)) == [1, 0], "priority goes before the deadline"
    lanes.charge(ticket(-1, caller="feed"), 0.75, 0.0)
    assert numbers(lanes.ordered(0.0)) == [1, 0], "three quarters are its share"
    lanes.charge(ticket(-1, caller="feed"), 0.01, 0.0)
    assert numbers(lanes.ordered(0.0)) == [0, 1]


def test_a_claim_that_changed_counts_from_the_callers_next_ticket():
    claims = {"feed": Lane(), "": Lane()}
    lanes = lanes_with(ticket(0, deadline_s=1.0), ticket(1, caller="feed", deadline_s=2.0), callers=claims)
    assert numbers(lanes.ordered(0.0)) == [0, 1]
    claims["feed"] = Lane(priority=5)
    lanes.add(WaitingTicket(ticket(2, caller="feed", deadline_s=3.0)), 0.0)
    assert numbers(lanes.ordered(0.0)) == [1, 2, 0]


def test_a_caller_beyond_its_share_has_no_claim_to_be_in_time_against_a_caller_within():
    lanes = lanes_with(ticket(0, caller="greedy", deadline_s=20.0), ticket(1, caller="other", deadline_s=20.0))
    lanes.charge(ticket(-1, caller="greedy"), 5.0, 0.0)
    before, behind = lanes.around(ticket(2, caller="modest", deadline_s=30.0), 0.0)
    assert (numbers(before), numbers(behind)) == ([1], [])
    before, behind = lanes.around(ticket(2, caller="greedy", deadline_s=10.0), 0.0)
    assert (numbers(before), numbers(behind)) == ([1], [0])


def test_the_size_of_anothers_tickets_counts_in_ones_own_lane_too():
    lanes = lanes_with(ticket(0, caller="greedy", rows=5000), ticket(1, caller="modest", rows=100))
    assert lanes.typical_rows_of_others(ticket(-1, caller="greedy"), 0.0) == 100
    assert lanes.typical_rows_of_others(ticket(-1, caller="modest"), 0.0) == 5000


def test_callers_that_come_no_more_are_forgotten():
    lanes = Lanes({}, 1)
    for number in range(1000):
        one = WaitingTicket(ticket(number, caller=f"connection {number}"))
        lanes.add(one, float(number))
        lanes.remove(one)
    assert len(lanes._flows) <= 64


def test_callers_of_a_group_have_one_share_together():
    claims = {"feed": Lane(), "": Lane()} | {f"anonymous {i}": Lane(group="anonymous") for i in range(9)}
    crowd = [ticket(i, caller=f"anonymous {i}", deadline_s=1.0) for i in range(9)]
    lanes = lanes_with(*crowd, ticket(9, caller="feed", deadline_s=2.0), callers=claims)
    lanes.charge(ticket(-1, caller="feed"), 0.49, 0.0)
    for one in crowd:
        lanes.charge(one, 0.056, 0.0)  # together a little more than half
    assert lanes.ordered(0.0)[0].ticket.caller == "feed"
    lanes.charge(ticket(-1, caller="feed"), 0.02, 0.0)
    assert lanes.ordered(0.0)[0].ticket.caller == "anonymous 0", "all are beyond their shares now"


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_ticket_of_others_is_known_whatever_came_and_went(seed):
    random = np.random.default_rng(seed)
    lanes, now_s, waiting = lanes_with(), 0.0, []
    means, came_s = {}, {}
    for number in range(400):
        now_s += random.exponential(0.1)
        if waiting and random.random() < 0.5:
            lanes.remove(waiting.pop(random.integers(len(waiting))))
        else:
            one = ticket(number, rows=int(random.integers(1, 300)), caller=f"caller {random.integers(12)}")
            waiting.append(WaitingTicket(one))
            lanes.add(waiting[-1], now_s)
            came_s[one.caller] = now_s
            before = means.get(one.caller, one.rows)
            means[one.caller] = before + 0.1 * (one.rows - before)
        asks = f"caller {random.integers(12)}"
        at_work = {one.ticket.caller for one in waiting} | {name for name, at in came_s.items() if now_s - at < 1}
        expected = min((means[name] for name in at_work - {asks}), default=math.inf)
        assert lanes.typical_rows_of_others(ticket(-1, caller=asks), now_s) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_callers_with_equal_claims_are_ordered_as_if_each_were_ranked(seed, monkeypatch):
    random = np.random.default_rng(seed)
    claims = {f"caller {i}": Lane(group="g" * (i < 3)) if seed % 2 else Lane(share=2.0) for i in range(6)} | {
        "": Lane()
    }
    even, ranked = lanes_with(callers=claims), lanes_with(callers=claims)
    monkeypatch.setattr(ranked, "_are_even", lambda *_: False)
    now_s, waiting = 0.0, []
    for number in range(400):
        now_s += random.exponential(0.05)
        if waiting and random.random() < 0.5:
            pair = waiting.pop(random.integers(len(waiting)))
            even.remove(pair[0])
            ranked.remove(pair[1])
        else:
            one = ticket(number, caller=f"caller {random.integers(6)}", deadline_s=now_s + random.exponential(1))
            waiting.append((WaitingTicket(one), WaitingTicket(one)))
            even.add(waiting[-1][0], now_s)
            ranked.add(waiting[-1][1], now_s)
        if random.random() < 0.5:
            charged, seconds = ticket(-1, caller=f"caller {random.integers(6)}"), random.exponential(0.1)
            even.charge(charged, seconds, now_s)
            ranked.charge(charged, seconds, now_s)
        new = ticket(number, caller=f"caller {random.integers(6)}", deadline_s=now_s + random.exponential(1))
        assert numbers(even.ordered(now_s)) == numbers(ranked.ordered(now_s))
        assert [*map(numbers, even.around(new, now_s))] == [*map(numbers, ranked.around(new, now_s))]


def test_much_smaller_tickets_of_others_are_counted_by_the_second():
    lanes = lanes_with(
        ticket(0, rows=100), ticket(1, rows=100), ticket(2, "ads", rows=1), ticket(3, "bulk", rows=130), now_s=1.0
    )
    assert lanes.smaller_per_s(ticket(-1, "bulk", rows=250), 1.0) == 3
    assert lanes.smaller_per_s(ticket(-1, "home", rows=250), 1.0) == 1, "not its own, nor those of half its size"
    assert lanes.smaller_per_s(ticket(-1, "bulk", rows=250), 2.0) == pytest.approx(3 / math.e)
