from __future__ import annotations

import asyncio

import pytest

from server.runtime import resting
from server.runtime.resting import Rest


@pytest.fixture
def order(monkeypatch):
    """What the event loop did, with the milliseconds of its rests."""
    done = []
    monkeypatch.setattr(resting, "time", Time(done))
    return done


class Time:
    """`time`, as far as it is used.

    Attributes:
        now_s: what the clock says.
    """

    def __init__(self, done):
        self._done, self.now_s = done, 1000.0

    def sleep(self, seconds):
        self._done.append(round(seconds * 1e3, 3))

    def monotonic(self):
        return self.now_s


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_one_rest_follows_what_was_ready_however_often_it_is_asked_for(order):
    counted = []
    rest, loop = Rest(counted.append), asyncio.get_running_loop()
    rest.after_this_turn(0.001)
    rest.after_this_turn(0.0015)
    loop.call_soon(order.append, "ready")
    await turns(4)
    assert order == ["ready", 1.5]
    assert counted == [0.0015]


async def test_a_rest_is_never_longer_than_2_ms_and_never_so_short_that_it_costs_more_than_it_gains(order):
    rest = Rest(lambda _: None)
    rest.after_this_turn(30.0)
    await turns(3)
    rest.after_this_turn(0.0001)
    rest.after_this_turn(-1.0)
    await turns(3)
    assert order == [2.0]


async def test_after_a_refusal_there_is_no_rest_for_100_ms_and_the_one_that_was_due_is_dropped(order):
    rest = Rest(lambda _: None)
    rest.after_this_turn(0.001)
    rest.not_now()
    await turns(3)
    resting.time.now_s += 0.09
    rest.after_this_turn(0.001)
    await turns(3)
    assert order == []
    resting.time.now_s += 0.02
    rest.after_this_turn(0.001)
    await turns(3)
    assert order == [1.0]
