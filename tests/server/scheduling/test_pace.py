from __future__ import annotations

import os
from contextlib import closing

import pytest

from server.scheduling import pace as pacing
from server.scheduling.pace import Pace


class Clock:
    """Time passes only in sleep, which may have a consequence."""

    def __init__(self):
        self.now_s = 0.0
        self.at = {}

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds
        for at_s in sorted(at_s for at_s in self.at if at_s <= self.now_s):
            self.at.pop(at_s)()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


@pytest.fixture
def pace():
    with closing(Pace()) as pace:
        yield pace


def test_a_rest_leaves_the_share_that_was_asked_for(pace, clock):
    assert pace.pause(0.01, 0.1) == 0
    assert clock.now_s == pytest.approx(0.09)
    pace.pause(0.01, 1)
    assert clock.now_s == pytest.approx(0.09)


def test_while_requests_need_much_it_lasts_longer_but_not_for_ever(pace, clock):
    pace.busy = True
    assert pace.pause(0.01, 0.1) == pytest.approx(15 * 0.09)
    assert clock.now_s == pytest.approx(16 * 0.09)


def test_it_ends_soon_after_they_need_less(pace, clock):
    pace.busy = True
    clock.at[0.2] = lambda: setattr(pace, "busy", False)
    pace.pause(0.01, 0.1)
    assert 0.2 <= clock.now_s <= 0.2 + 0.004


def test_another_process_sees_it(pace):
    with closing(Pace(os.dup(pace.file))) as other:
        assert not other.busy
        pace.busy = True
        assert other.busy
