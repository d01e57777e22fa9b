from __future__ import annotations

import random

from server.scheduling.queued_request import Deadlines


def test_only_the_earliest_deadline_needs_a_timer():
    deadlines, waiting = Deadlines(), {1, 2, 3}
    assert deadlines.next_s is None
    assert deadlines.add(1, 5.0, waiting)
    assert not deadlines.add(2, 6.0, waiting)
    assert deadlines.add(3, 4.0, waiting)
    assert deadlines.next_s == 4.0


def test_what_has_passed_is_told_once_and_what_was_answered_is_not():
    deadlines, waiting = Deadlines(), {1, 2, 3, 4}
    for number in waiting:
        deadlines.add(number, float(number), waiting)
    waiting.discard(2)
    assert deadlines.passed(3.0, waiting) == [1, 3]
    assert deadlines.passed(3.0, waiting) == []
    assert deadlines.next_s == 4.0
    waiting.discard(4)
    assert deadlines.passed(3.0, waiting) == []
    assert deadlines.next_s is None


def test_requests_that_were_answered_long_before_their_deadlines_do_not_pile_up():
    deadlines, waiting, rng = Deadlines(), set(), random.Random(1)
    for number in range(10_000):
        waiting.add(number)
        deadlines.add(number, 3600.0 + rng.random(), waiting)
        if len(waiting) > 5:
            waiting.remove(rng.choice(sorted(waiting)))
        assert len(deadlines) <= 100
    assert sorted(deadlines.passed(4000.0, waiting)) == sorted(waiting)
