from __future__ import annotations

import math

import pytest

from server.scheduling.contract import Ticket
from server.scheduling.joining import Arrivals, joiners, worth_waiting_until_s
from server.scheduling.lanes import WaitingTicket
from tests.server.scheduling.straight_cost import StraightCost

#: 1 s a run and 1 s for each 128 rows: a ticket of 128 rows that joins delays the others by 1 s and saves 1 s.
COST = StraightCost(fixed_s=1.0, per_row_s=1 / 128)


def waiting(number=0, deadline_s=100.0, rows=128, start=0):
    return WaitingTicket(Ticket(number, rows, deadline_s, "m", "home"), ready=True, start=start)


def arrivals(*times_s, rows=(128,)):
    found = Arrivals()
    for number, time_s in enumerate(times_s):
        found.observe(Ticket(number, rows[number % len(rows)], 100.0, "m", "home"), time_s)
    return found


def test_the_gap_between_tickets_is_a_mean_that_forgets():
    assert arrivals(7.0).gap_s == math.inf
    assert arrivals(7.0, 8.0).gap_s == 1.0
    assert arrivals(7.0, 8.0, 8.5).gap_s == pytest.approx(0.95)


def test_tickets_at_the_same_moment_have_a_gap_of_a_microsecond():
    assert arrivals(7.0, 7.0).gap_s == arrivals(7.0, 6.0).gap_s == 1e-6


def test_the_size_of_tickets_is_a_mean_that_forgets_in_whole_rows():
    assert arrivals(7.0, rows=(100,)).rows == 100
    assert arrivals(7.0, 8.0, rows=(100, 200)).rows == 110
    assert arrivals(7.0, 8.0, rows=(100, 104)).rows == 100


@pytest.mark.parametrize(
    ("behind", "joined"),
    [
        pytest.param(1, 1, id="it saves as much as it costs the one in the run"),
        pytest.param(2, 1, id="the second would delay two by a second each and save one second for one"),
        pytest.param(3, 2, id="the second saves a second for each of two"),
        pytest.param(5, 3, id="the third saves a second for each of three"),
    ],
)
def test_tickets_join_as_long_as_all_behind_gain_what_those_in_the_run_lose(behind, joined):
    others = [waiting(number) for number in range(1, behind + 1)]
    assert joiners(waiting(), others, behind, COST, 0.0) == others[:joined]


def test_who_waits_behind_gains_although_it_may_not_join_itself():
    others = [waiting(1), waiting(2)]
    assert joiners(waiting(), others, 2, COST, 0.0) == others[:1]
    assert joiners(waiting(), others, 3, COST, 0.0) == others


@pytest.mark.parametrize(
    ("behind", "deadline_s", "joined"),
    [
        pytest.param(1, 99.0, 0, id="0.75 s saved for one, 1.25 s lost for one"),
        pytest.param(2, 99.0, 1, id="0.75 s saved for each of two"),
        pytest.param(4, 99.0, 1, id="0.75 s saved for each of three, 1.25 s lost for each of two"),
        pytest.param(5, 99.0, 2, id="0.75 s saved for each of four, 1.25 s lost for each of two"),
        pytest.param(2, 3.25, 1, id="two are just in time"),
        pytest.param(2, 3.24, 0, id="two would be late"),
    ],
)
def test_what_a_request_costs_beyond_its_rows_counts(behind, deadline_s, joined):
    cost = StraightCost(fixed_s=0.75, per_request_s=0.25, per_row_s=1 / 128)
    others = [waiting(number) for number in range(1, behind + 1)]
    assert joiners(waiting(deadline_s=deadline_s), others, behind, cost, 0.0) == others[:joined]


def test_a_further_request_costs_its_part_of_a_run():
    dear = StraightCost(per_request_s=1.0, per_row_s=1 / 128)  # requests of one run share nothing
    assert joiners(waiting(), [waiting(1)], 1, dear, 0.0) == []


@pytest.mark.parametrize(
    ("deadlines_s", "now_s", "joined"),
    [
        pytest.param((3.0, 99.0, 99.0), 0.0, 1, id="the head is just in time with one more"),
        pytest.param((2.9, 99.0, 99.0), 0.0, 0, id="the head would be late"),
        pytest.param((3.0, 99.0, 99.0), 0.1, 0, id="the head would be late: time has passed"),
        pytest.param((99.0, 3.0, 99.0), 0.0, 1, id="the first that joins is just in time alone"),
        pytest.param((99.0, 2.9, 99.0), 0.0, 0, id="the first that joins would be late"),
        pytest.param((99.0, 4.0, 99.0), 0.0, 2, id="the first that joins is just in time with the second"),
        pytest.param((99.0, 99.0, 4.0), 0.0, 2, id="the second is just in time"),
        pytest.param((99.0, 99.0, 3.9), 0.0, 1, id="the second would be late"),
    ],
)
def test_joining_makes_no_member_late(deadlines_s, now_s, joined):
    head, *others = (waiting(number, deadline_s) for number, deadline_s in enumerate(deadlines_s))
    assert joiners(head, others, 10, COST, now_s) == others[:joined]


def test_promises_of_a_joint_run_are_careful():
    careful = StraightCost(fixed_s=1.0, per_row_s=1 / 128, careful=2.0)
    assert joiners(waiting(deadline_s=6.0), [waiting(1)], 1, careful, 0.0) != []
    assert joiners(waiting(deadline_s=5.9), [waiting(1)], 1, careful, 0.0) == []


def test_of_a_ticket_that_is_in_runs_already_only_what_is_left_counts():
    # 128 of 256 rows are left: together with 128 more they take 3 s.
    assert joiners(waiting(rows=256, start=128, deadline_s=3.0), [waiting(1)], 1, COST, 0.0) != []


@pytest.mark.parametrize(
    ("gap_s", "deadline_s", "until_s"),
    [
        pytest.param(0.5, 100.0, 8.0, id="twice the gap"),
        pytest.param(0.9, 100.0, 8.8, id="the gap is just shorter than what joining saves"),
        pytest.param(1.0, 100.0, 7.0, id="the gap is as long as what joining saves"),
        pytest.param(0.5, 11.0, 7.5, id="as long as the two could still end in time"),
    ],
)
def test_a_ticket_waits_for_one_that_comes_sooner_than_joining_saves(gap_s, deadline_s, until_s):
    # Two of 128 rows: 2.25 s each, 3.5 s together.
    cost = StraightCost(fixed_s=1.0, per_request_s=0.25, per_row_s=1 / 128)
    seen = arrivals(1.0, 1.0 + gap_s)
    assert worth_waiting_until_s(waiting(deadline_s=deadline_s), seen, cost, 7.0) == pytest.approx(until_s)


def test_a_ticket_whose_model_had_no_other_yet_does_not_wait():
    assert worth_waiting_until_s(waiting(), arrivals(1.0), COST, 7.0) == 7.0


def test_how_long_a_ticket_may_wait_depends_on_how_large_the_next_one_will_be():
    # 64 rows of its own and 192 of the next one's: 3 s together.
    seen = arrivals(1.0, 1.5, rows=(192,))
    assert worth_waiting_until_s(waiting(rows=64, deadline_s=10.25), seen, COST, 7.0) == 7.25
