from __future__ import annotations

import random

import pytest

from server.batching import EarliestDeadlineFirst, Expire, Idle, Run, Ticket


def ticket(number, deadline_s, rows=10, model="a", cost_s=0.0):
    return Ticket(number, rows, deadline_s, model, cost_s)


def test_nothing_offered_is_idle():
    assert EarliestDeadlineFirst(rows_target=32).next(0.0) == Idle()


@pytest.mark.parametrize(
    ("tickets", "expected"),
    [
        pytest.param([(0, 9.0, 40), (1, 3.0, 40)], [[1], [0]], id="earliest deadline first"),
        pytest.param([(0, 3.0, 40), (1, 3.0, 40)], [[0], [1]], id="equal deadlines in order of arrival"),
        pytest.param([(0, 1.0, 10), (1, 2.0, 10), (2, 3.0, 13)], [[0, 1], [2]], id="small ones share up to the target"),
        pytest.param([(0, 1.0, 500)], [[0]], id="one above the target runs alone"),
        pytest.param([(0, 1.0, 10), (1, 2.0, 500), (2, 3.0, 10)], [[0], [1], [2]], id="a large one is not overtaken"),
    ],
)
def test_runs(tickets, expected):
    policy = EarliestDeadlineFirst(rows_target=32)
    for number, deadline_s, rows in tickets:
        policy.offer(ticket(number, deadline_s, rows))
    runs = []
    while isinstance(decision := policy.next(0.0), Run):
        runs.append([t.number for t in decision.tickets])
    assert decision == Idle()
    assert runs == expected


def test_a_run_never_mixes_models():
    policy = EarliestDeadlineFirst(rows_target=100)
    for number, model in enumerate("aabba"):
        policy.offer(ticket(number, float(number + 1), model=model))
    runs = [policy.next(0.0) for _ in range(3)]
    assert [[t.number for t in run.tickets] for run in runs] == [[0, 1], [2, 3], [4]]


def test_expired_tickets_come_back_before_anything_runs():
    policy = EarliestDeadlineFirst(rows_target=32)
    early, late = ticket(0, 1.0), ticket(1, 5.0)
    policy.offer(early)
    policy.offer(late)
    assert policy.next(1.0) == Expire((early,))
    assert policy.next(1.0) == Run((late,))


def test_ticket_that_would_end_late_expires_before_it_costs_the_others_their_time():
    policy = EarliestDeadlineFirst(rows_target=32)
    hopeless, fine = ticket(0, 1.0, cost_s=0.5), ticket(1, 2.0, cost_s=0.5)
    policy.offer(hopeless)
    policy.offer(fine)
    assert policy.next(0.6) == Expire((hopeless,))
    assert policy.next(0.6) == Run((fine,))


def test_ticket_predicted_late_is_tried_when_nothing_else_waits():
    policy = EarliestDeadlineFirst(rows_target=32)
    alone = ticket(0, 1.0, cost_s=0.5)
    policy.offer(alone)
    assert policy.next(0.6) == Run((alone,))
    policy.offer(alone)
    assert policy.next(1.0) == Expire((alone,))


def test_ticket_predicted_late_joins_no_run():
    policy = EarliestDeadlineFirst(rows_target=32)
    first, late = ticket(0, 1.0), ticket(1, 1.1, cost_s=5.0)
    policy.offer(first)
    policy.offer(late)
    assert policy.next(0.0) == Run((first,))


def test_cancelled_ticket_never_comes_back():
    policy = EarliestDeadlineFirst(rows_target=32)
    first, second = ticket(0, 1.0), ticket(1, 2.0)
    policy.offer(first)
    policy.offer(second)
    policy.cancel(first)
    assert policy.next(0.0) == Run((second,))
    policy.cancel(second)  # it is running: nothing left to forget
    assert policy.next(0.0) == Idle()


def test_cancelled_tickets_with_far_deadlines_take_no_room():
    policy = EarliestDeadlineFirst(rows_target=32)
    kept = [ticket(number, 1e6 + number) for number in range(3)]
    for one in kept:
        policy.offer(one)
    for number in range(3, 10_000):
        policy.offer(ticket(number, 1e9))
        policy.cancel(ticket(number, 1e9))
    assert len(policy._heap) < 100
    assert policy.next(0.0) == Run(tuple(kept))


def test_a_ticket_is_offered_once():
    policy = EarliestDeadlineFirst(rows_target=32)
    policy.offer(ticket(0, 1.0))
    with pytest.raises(ValueError, match="already waiting"):
        policy.offer(ticket(0, 1.0))


@pytest.mark.parametrize("seed", range(200))
def test_every_ticket_comes_back_exactly_once_and_none_runs_after_its_deadline(seed):
    rng = random.Random(seed)
    policy = EarliestDeadlineFirst(rows_target=rng.choice([1, 32, 200]))
    now, waiting, answered = 0.0, {}, set()
    for number in range(300):
        now += rng.expovariate(100)
        budget_s, cost_s = rng.choice([0.0, 0.01, 0.1, 10.0]), rng.choice([0.0, 0.005, 0.05])
        offered = ticket(number, now + budget_s, rng.randint(1, 100), rng.choice("ab"), cost_s)
        policy.offer(offered)
        waiting[number] = offered
        if rng.random() < 0.2:
            gone = rng.choice(list(waiting.values()))
            policy.cancel(gone)
            del waiting[gone.number]
        while rng.random() < 0.5 and not isinstance(decision := policy.next(now), Idle):
            assert isinstance(decision, Run | Expire)
            for back in decision.tickets:
                assert waiting.pop(back.number) == back
                assert back.number not in answered
                answered.add(back.number)
                if isinstance(decision, Expire):
                    assert back.deadline_s - back.cost_s <= now
                else:
                    assert back.deadline_s > now
                    assert back.deadline_s - back.cost_s > now or (len(decision.tickets) == 1 and not waiting)
            assert isinstance(decision, Expire) or len({back.model for back in decision.tickets}) == 1
    while not isinstance(decision := policy.next(now + 100), Idle):
        for back in decision.tickets:
            del waiting[back.number]
    assert not waiting
