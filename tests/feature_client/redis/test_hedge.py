"""A call that is sent a second time when it is slow: which attempt wins, and what becomes of the other."""

from __future__ import annotations

import asyncio
import math

import pytest

from feature_client.stores.redis.hedge import HedgedCall


class Attempts:
    """Attempts that end when a test says so.

    Attributes:
        made: the attempts so far, as futures.
        cancelled: the numbers of the attempts that were cancelled, in order.
    """

    def __init__(self) -> None:
        self.made: list[asyncio.Future[str]] = []
        self.cancelled: list[int] = []
        self.second_made = asyncio.Event()

    async def send(self) -> str:
        number = len(self.made)
        attempt: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.made.append(attempt)
        if number:
            self.second_made.set()
        try:
            return await attempt
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise

    def call(self, budget_s: float = 60.0, slow_s: float = 0.0, *, hedged: bool = True) -> asyncio.Task[str]:
        async def run() -> str:
            return await HedgedCall(self.send, budget_s, slow_s, lambda: hedged).run()

        return asyncio.create_task(run())


async def test_a_call_that_is_not_slow_makes_one_attempt_in_the_callers_task():
    async def send():
        return asyncio.current_task()

    assert await HedgedCall(send, 60.0, 60.0, lambda: True).run() is asyncio.current_task()


async def test_the_first_attempt_that_succeeds_wins_and_the_other_is_cancelled():
    for winner in (0, 1):
        attempts = Attempts()
        call = attempts.call()
        await attempts.second_made.wait()
        attempts.made[winner].set_result(f"of {winner}")
        assert await call == f"of {winner}"
        await asyncio.sleep(0)
        assert attempts.cancelled == [1 - winner]
        assert call.cancelling() == 0


async def test_both_attempts_that_succeed_at_the_same_time_give_one_result():
    attempts = Attempts()
    call = attempts.call()
    await attempts.second_made.wait()
    attempts.made[1].set_result("of 1")
    attempts.made[0].set_result("of 0")
    assert await call in {"of 0", "of 1"}
    assert call.cancelling() == 0


async def test_after_one_attempt_failed_the_other_is_awaited():
    for fails in (0, 1):
        attempts = Attempts()
        call = attempts.call()
        await attempts.second_made.wait()
        attempts.made[fails].set_exception(OSError("cut"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not call.done()
        attempts.made[1 - fails].set_result("found")
        assert await call == "found"
        assert attempts.cancelled == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_call_fails_when_all_attempts_failed(order):
    attempts = Attempts()
    call = attempts.call()
    await attempts.second_made.wait()
    for number in order:
        attempts.made[number].set_exception(OSError("cut"))
        await asyncio.sleep(0)
    with pytest.raises(OSError, match="cut"):
        await call


async def test_a_first_attempt_that_fails_before_it_is_slow_fails_the_call():
    attempts = Attempts()
    call = attempts.call(slow_s=60.0)
    await asyncio.sleep(0)
    attempts.made[0].set_exception(OSError("cut"))
    with pytest.raises(OSError, match="cut"):
        await call
    assert len(attempts.made) == 1


@pytest.mark.parametrize("slow_s", [0.0, 60.0, math.inf])
async def test_the_time_limit_ends_all_attempts(slow_s):
    attempts = Attempts()
    call = attempts.call(budget_s=0.01, slow_s=slow_s)
    with pytest.raises(TimeoutError):
        await call
    await asyncio.sleep(0)
    assert attempts.cancelled == list(range(len(attempts.made)))
    assert len(attempts.made) == (2 if slow_s == 0.0 else 1)
    assert call.cancelling() == 0


async def test_the_time_limit_holds_for_the_second_attempt_after_the_first_failed():
    attempts = Attempts()
    call = attempts.call(budget_s=0.05)
    await attempts.second_made.wait()
    attempts.made[0].set_exception(OSError("cut"))
    with pytest.raises(TimeoutError):
        await call
    await asyncio.sleep(0)
    assert attempts.cancelled == [1]


async def test_no_second_attempt_is_made_when_there_were_too_many():
    attempts = Attempts()
    call = attempts.call(budget_s=0.01, hedged=False)
    with pytest.raises(TimeoutError):
        await call
    assert len(attempts.made) == 1


@pytest.mark.parametrize("hedged", [True, False])
async def test_a_caller_that_is_cancelled_cancels_all_attempts(hedged):
    attempts = Attempts()
    call = attempts.call(slow_s=0.0 if hedged else 60.0)
    await (attempts.second_made.wait() if hedged else asyncio.sleep(0))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)
    assert attempts.cancelled == list(range(len(attempts.made)))
    assert len(attempts.made) == (2 if hedged else 1)


async def test_a_caller_that_is_cancelled_as_the_second_attempt_succeeds_stays_cancelled():
    attempts = Attempts()
    call = attempts.call()
    await attempts.second_made.wait()
    attempts.made[1].set_result("too late")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_an_outer_time_limit_is_told_from_the_calls_own():
    attempts = Attempts()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await HedgedCall(attempts.send, 60.0, 60.0, lambda: True).run()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
