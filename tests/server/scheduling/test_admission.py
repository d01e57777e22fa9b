from __future__ import annotations

import pytest

from server.scheduling.admission import Admission, Admit, Ask, Overload, Refuse, Trim, UseCheaper
from server.scheduling.cost import CostModel
from server.scheduling.earliest_deadline import EarliestDeadlineFirst

COSTS = {
    "m": CostModel(lambda rows: 0.3e-3 + 35e-6 * rows),
    "cheap": CostModel(lambda rows: 0.1e-3 + 2e-6 * rows),
}


def admission(overload=None, requests_max=100, rows_max=100_000, bytes_max=1 << 30, streams=2):
    policy = EarliestDeadlineFirst(streams, COSTS.__getitem__)
    return policy, Admission(policy, {"home": overload or Overload()}, requests_max, rows_max, bytes_max)


def ask(rows=128, deadline_s=0.02, cheaper=None, size=1000):
    return Ask("home", rows, size, deadline_s, "m", cheaper)


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
    assert "make 1 requests late that were here before" in decision.reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"requests_max": 1}, "1 requests in flight, the limit is 1"),
        ({"rows_max": 200}, "128 rows in flight and 128 more asked, the limit is 200"),
        ({"bytes_max": 1500}, "1000 bytes in flight and 1000 more needed, the limit is 1500"),
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
