from __future__ import annotations

import math

import pytest

from server.scheduling.admission import Admission, Admit, Ask, Overload, Refuse, Trim, UseCheaper
from server.scheduling.contract import Forecast
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst

COSTS = {
    "m": CostModel(lambda rows: 0.3e-3 + 35e-6 * rows),
    "cheap": CostModel(lambda rows: 0.1e-3 + 2e-6 * rows),
}


def admission(overload=None, requests_max=100, rows_max=100_000, bytes_max=1 << 30, streams=2):
    policy = EarliestDeadlineFirst(streams, COSTS.__getitem__)
    return policy, Admission(policy, {"home": overload or Overload()}, requests_max, rows_max, bytes_max)


def ask(rows=128, deadline_s=0.02, cheaper=None, size=1000, caller=""):
    return Ask("home", rows, size, deadline_s, "m", cheaper, caller)


def fill(door, deadline_s=0.02):
    """Let requests in until one is turned away; that decision, and how many came in."""
    count = 0
    while isinstance(decision := door.offer(ask(deadline_s=deadline_s), 0.0), Admit):
        count += 1
    return decision, count


def test_requests_come_in_as_long_as_their_deadlines_can_be_met():
    policy, door = admission()
    decision, count = fill(door)
    # Two streams, 4.8 ms each, 20 ms: eight typically; promises are careful, so one or two fewer.
    assert 5 <= count <= 8
    assert (door.requests, door.rows, door.bytes) == (count, 128 * count, 1000 * count)
    assert isinstance(decision, Refuse)
    assert "ms after the deadline" in decision.reason
    assert 0.001 <= decision.retry_after_s < 0.01
    assert len(policy) == count  # a refused request leaves nothing behind


def test_a_place_that_is_given_back_is_taken_by_the_next():
    policy, door = admission()
    first = door.offer(ask(), 0.0)
    fill(door)
    policy.cancel(first.ticket)
    door.release(first.ticket, 1000)
    assert isinstance(door.offer(ask(), 0.0), Admit)


def test_a_request_that_would_make_another_late_is_refused_and_says_so():
    _, door = admission(streams=1)
    door.offer(ask(deadline_s=0.012), 0.0)
    decision = door.offer(ask(rows=190, deadline_s=0.0119), 0.0)
    assert isinstance(decision, Refuse)
    assert "make 1 earlier requests late" in decision.reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        pytest.param({"requests_max": 1}, "1 requests are in flight, and the limit is 1", id="requests"),
        pytest.param(
            {"rows_max": 200}, "128 rows are in flight and the request has 128, but the limit is 200", id="rows"
        ),
        pytest.param(
            {"bytes_max": 1500}, "1000 bytes are in use and the request needs 1000, but the limit is 1500", id="bytes"
        ),
    ],
)
def test_limits_are_kept_and_named(limits, reason):
    _, door = admission(**limits)
    door.offer(ask(deadline_s=9), 0.0)
    decision = door.offer(ask(deadline_s=9), 0.0)
    assert isinstance(decision, Refuse)
    assert decision.reason == reason
    assert decision.retry_after_s > 0


def test_a_request_above_every_limit_is_served_alone():
    _, door = admission(rows_max=10, bytes_max=10)
    assert isinstance(door.offer(ask(rows=5000, deadline_s=9), 0.0), Admit)


def test_alone_a_request_is_tried_although_it_is_predicted_late():
    _, door = admission()
    assert isinstance(door.offer(ask(deadline_s=0.0001), 0.0), Admit)
    assert isinstance(door.offer(ask(deadline_s=0.0001), 0.0), Refuse)


def test_a_request_is_trimmed_to_about_what_fits_and_its_place_is_of_that_size():
    policy, door = admission(Overload(("trim",), 16))
    decision = door.offer(ask(rows=2000, deadline_s=0.02), 0.0)
    assert isinstance(decision, Trim)
    # Two streams for 20 ms score about 1,000 rows; promises are careful.
    assert 700 <= decision.ticket.rows <= 1000
    assert door.rows == decision.ticket.rows
    assert policy.forecast(decision.ticket, 0.0).finish_s > 0.02  # a second one of its size would not fit beside it


def test_below_the_least_that_is_worth_it_a_request_is_refused_instead_of_trimmed():
    _, door = admission(Overload(("trim",), 100))
    door.offer(ask(deadline_s=9), 0.0)
    assert isinstance(door.offer(ask(deadline_s=0.002), 0.0), Refuse)


def test_a_cheaper_model_answers_where_the_surface_allows_it_and_the_request_may():
    _, door = admission(Overload(("cheaper",)))
    fill(door)
    decision = door.offer(ask(cheaper="cheap"), 0.0)
    assert isinstance(decision, UseCheaper)
    assert (decision.ticket.model, decision.ticket.rows) == ("cheap", 128)
    assert isinstance(door.offer(ask(cheaper=None), 0.0), Refuse)
    _, strict = admission(Overload())
    fill(strict)
    assert isinstance(strict.offer(ask(cheaper="cheap"), 0.0), Refuse)


def test_actions_are_tried_in_the_surfaces_order():
    for actions, kind in ((("trim", "cheaper"), Trim), (("cheaper", "trim"), UseCheaper)):
        _, door = admission(Overload(actions, 1))
        door.offer(ask(deadline_s=9, rows=256), 0.0)
        assert isinstance(door.offer(ask(rows=2000, deadline_s=0.02, cheaper="cheap"), 0.0), kind)


@pytest.mark.parametrize("limits", [{"requests_max": 2}, {"rows_max": 256}, {"bytes_max": 2000}], ids=str)
def test_a_limit_may_be_reached_exactly(limits):
    _, door = admission(**limits)
    assert isinstance(door.offer(ask(deadline_s=9), 0.0), Admit)
    assert isinstance(door.offer(ask(deadline_s=9), 0.0), Admit)
    assert isinstance(door.offer(ask(deadline_s=9), 0.0), Refuse)


def test_a_place_that_is_given_back_is_as_large_as_the_one_that_was_taken():
    _, door = admission()
    first, _ = (door.offer(ask(rows=rows, deadline_s=9, size=size), 0.0) for rows, size in ((100, 7), (28, 5)))
    door.release(first.ticket, 7)
    assert (door.requests, door.rows, door.bytes) == (1, 28, 5)


class ForetellingPolicy:
    """A policy that foretells what it is told, by rows, and notes which rows it is asked about."""

    def __init__(self, foretells):
        self.foretells = foretells
        self.asked = []
        self.reserved = []

    def forecast(self, ticket, now_s):
        self.asked.append(ticket.rows)
        return self.foretells(ticket.rows)

    def reserve(self, ticket, now_s):
        self.reserved.append(ticket)

    def free_in_s(self, now_s):
        return 0.5


def busy_door(foretells, overload=None):
    """An admission with one request in flight, and its policy."""
    policy = ForetellingPolicy(lambda rows: Forecast(0.0, 0))
    door = Admission(policy, {"home": overload or Overload()}, 100, 100_000, 1 << 30)
    door.offer(ask(rows=1), 0.0)
    policy.foretells = foretells
    policy.asked.clear()
    return policy, door


def in_time_up_to(most):
    return lambda rows: Forecast(1.0 if rows <= most else 3.0, 0)


def test_just_in_time_is_in_time():
    _, door = busy_door(lambda rows: Forecast(2.0, 0))
    assert isinstance(door.offer(ask(deadline_s=2.0), 1.0), Admit)


@pytest.mark.parametrize(
    ("forecast", "reason", "retry_after_s"),
    [
        pytest.param(Forecast(2.25, 0), "the answer would arrive 250.0 ms after the deadline", 0.25, id="late"),
        pytest.param(
            Forecast(2.25, 7), "the answer would arrive 250.0 ms after the deadline", 0.25, id="late and harmful"
        ),
        pytest.param(Forecast(2.0, 3), "it would make 3 earlier requests late", 0.001, id="harmful"),
    ],
)
def test_a_refusal_says_whether_the_request_or_others_would_be_late(forecast, reason, retry_after_s):
    policy, door = busy_door(lambda rows: forecast)
    assert door.offer(ask(deadline_s=2.0), 1.0) == Refuse(f"{reason}; 1 requests are in flight", retry_after_s)
    assert len(policy.reserved) == door.requests == 1


def test_where_a_limit_is_reached_the_caller_comes_again_when_it_would_have_been_answered():
    policy, door = busy_door(lambda rows: Forecast(2.25, 0))
    decision = door.offer(ask(deadline_s=2.0, size=1 << 30), 1.0)
    assert decision.retry_after_s == 1.25
    policy.foretells = lambda rows: Forecast(0.5, 0)
    assert door.offer(ask(deadline_s=2.0, size=1 << 30), 1.0).retry_after_s == 0.0


def test_the_search_for_what_fits_halves_and_ends_within_a_sixteenth():
    policy, door = busy_door(in_time_up_to(700), Overload(("trim",), 16))
    assert door.offer(ask(rows=1000, deadline_s=2.0), 1.0).ticket.rows == 687
    assert policy.asked == [1000, 500, 750, 625, 687]
    assert policy.reserved[-1].rows == 687


@pytest.mark.parametrize(
    ("rows", "asked"),
    [
        pytest.param(1, [1], id="there are no fewer rows than one"),
        pytest.param(1000, [1000, 500, 750, 875, 937], id="937 is within 62 of 999"),
    ],
)
def test_the_search_for_what_fits_is_among_fewer_rows_than_were_asked(rows, asked):
    policy, door = busy_door(in_time_up_to(rows - 1), Overload(("trim",), 1))
    door.offer(ask(rows=rows, deadline_s=2.0), 1.0)
    assert policy.asked == asked


@pytest.mark.parametrize(
    ("rows", "fit", "trimmed"),
    [
        pytest.param(33, 32, 32, id="the least is one less than was asked"),
        pytest.param(34, 32, 32, id="the least alone fits"),
        pytest.param(100, 31, 0, id="fewer than the least fit"),
        pytest.param(32, 31, 0, id="the least was asked"),
        pytest.param(20, 19, 0, id="fewer than the least were asked"),
        pytest.param(48, 40, 40, id="a sixteenth is three rows"),
        pytest.param(1, 0, 0, id="one row does not fit"),
    ],
)
def test_a_surface_is_trimmed_to_32_rows_or_more_unless_it_says_otherwise(rows, fit, trimmed):
    _, door = busy_door(in_time_up_to(fit), Overload(("trim",)))
    decision = door.offer(ask(rows=rows, deadline_s=2.0), 1.0)
    assert (decision.ticket.rows if isinstance(decision, Trim) else 0) == trimmed


@pytest.mark.parametrize("asked", [2, 15, 16, 17, 100, 1000])
def test_what_a_request_is_trimmed_to_fits_and_little_more_would(asked):
    for fit in range(asked):
        _, door = busy_door(in_time_up_to(fit), Overload(("trim",), 1))
        decision = door.offer(ask(rows=asked, deadline_s=2.0), 1.0)
        rows = decision.ticket.rows if isinstance(decision, Trim) else 0
        assert fit - asked // 16 <= rows <= fit
        assert (rows > 0) == (fit > 0)


def test_every_request_gets_a_number_of_its_own():
    policy, door = busy_door(lambda rows: Forecast(1.0, 0))
    for _ in range(3):
        door.offer(ask(deadline_s=2.0), 1.0)
    assert len({ticket.number for ticket in policy.reserved}) == 4


def test_what_the_queue_alone_decides_is_refused_before_anything_is_known_of_the_request():
    policy, door = admission(requests_max=2, streams=1)
    assert door.refusal_of_any(0.0, 0.0) is None, "alone, a request is tried"
    first = door.offer(ask(deadline_s=9), 0.0)
    policy.offer(first.ticket, 0.0)
    run_s = policy.forecast(first.ticket, 0.0).finish_s
    policy.next(0.0)
    assert door.refusal_of_any(0.0, 9.0) is None
    soonest_s = policy.free_in_s(0.0)
    assert 0 < soonest_s < run_s
    assert door.refusal_of_any(0.0, soonest_s) is None
    late = door.refusal_of_any(0.0, soonest_s - 0.001)
    assert late.reason == "the answer would arrive 1.0 ms after the deadline; 1 requests are in flight"
    assert late.retry_after_s == pytest.approx(0.001)
    door.offer(ask(deadline_s=9), 0.0)
    assert door.refusal_of_any(0.0, math.inf) == Refuse("2 requests are in flight, and the limit is 2", soonest_s)


def fill_as(door, caller, now_s=0.0, **more):
    """Let a caller's requests in until one is turned away; how many came in, and why no more did."""
    count = 0
    while isinstance(decision := door.offer(ask(deadline_s=1e6, caller=caller, **more), now_s), Admit):
        count += 1
    return count, decision.reason


@pytest.mark.parametrize(
    ("limits", "unit"),
    [({"requests_max": 90}, "requests"), ({"rows_max": 90 * 128}, "rows"), ({"bytes_max": 90_000}, "bytes")],
)
def test_while_others_call_no_caller_holds_more_than_is_free(limits, unit):
    _, door = admission(**{"requests_max": 1000} | limits)
    assert isinstance(door.offer(ask(deadline_s=1e6, caller="modest"), 0.0), Admit)
    count, reason = fill_as(door, "greedy", 1.0)
    assert count == 45, "44 are left to others"
    assert unit in reason
    assert "others call too" in reason
    assert fill_as(door, "third", 2.0)[0] == 22
    assert isinstance(door.offer(ask(deadline_s=1e6, caller="modest"), 3.0), Admit)


@pytest.mark.parametrize(
    ("now_s", "most"),
    [
        pytest.param(9.9, 50, id="another called less than ten seconds ago"),
        pytest.param(10.0, 99, id="it was ten seconds ago"),
    ],
)
def test_who_calls_alone_may_fill_the_limits(now_s, most):
    _, door = admission()
    door.offer(ask(deadline_s=1e6, caller="modest"), 0.0)
    assert fill_as(door, "greedy", now_s)[0] == most


def test_the_servers_own_requests_are_no_other_caller():
    _, door = admission()
    door.offer(ask(deadline_s=1e6), 0.0)
    assert fill_as(door, "one", 0.0)[0] == 99


def test_what_a_caller_held_is_free_again():
    policy, door = admission()
    first = door.offer(ask(deadline_s=1e6, caller="greedy"), 0.0)
    door.offer(ask(deadline_s=1e6, caller="modest"), 0.0)
    fill_as(door, "greedy")
    policy.cancel(first.ticket)
    door.release(first.ticket, 1000)
    assert isinstance(door.offer(ask(deadline_s=1e6, caller="greedy"), 0.0), Admit)
    assert isinstance(door.offer(ask(deadline_s=1e6, caller="greedy"), 0.0), Refuse)
