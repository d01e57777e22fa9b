from __future__ import annotations

import pytest

from server.scheduling.contract import Forecast
from tests.server.scheduling.policies import exactly, on_cpu, policy, ticket


def test_a_forecast_counts_what_runs_and_waits_before_and_whom_it_harms():
    chosen = policy()
    alone = chosen.forecast(ticket(0, 1.0), 0.0)
    assert on_cpu(1, 128) <= alone.finish_s < 1.5 * on_cpu(1, 128)
    for number in range(3):
        chosen.offer(ticket(number, 0.5), 0.0)
    chosen.next(0.0)
    after = chosen.forecast(ticket(9, 1.0), 0.0)
    assert after.finish_s == pytest.approx(alone.finish_s + 3 * on_cpu(1, 128), rel=0.1)
    assert after.harms == 0
    chosen.offer(ticket(5, 4.5 * on_cpu(1, 128), rows=128), 0.0)
    assert chosen.forecast(ticket(9, 0.001, rows=512), 0.0).harms == 1
    assert len(chosen) == 3  # a forecast leaves nothing behind


def test_a_forecast_without_anything_before_it_is_a_typical_run_over_the_streams_that_it_may_take():
    chosen = exactly(streams=3)
    assert chosen.forecast(ticket(0, 99.0), 5.0) == Forecast(7.0 - 1 + 43 / 128, 0), "the first of its lane: all three"
    chosen.offer(ticket(0, 99.0), 5.0)
    chosen.next(5.0)
    chosen.cancel(ticket(0))
    # Of 43 rows, 1.34 s, a third counts for each stream.
    part_s = 1 + 43 / 128
    assert chosen.forecast(ticket(1, 99.0), 5.0).finish_s == pytest.approx(5.0 + part_s / 3 + part_s)


def test_a_forecast_behind_others_is_a_careful_promise_from_when_a_stream_is_free():
    chosen = exactly(streams=2)
    chosen.reserve(ticket(0, 50.0), 5.0)
    assert chosen.forecast(ticket(1, 99.0), 5.0) == Forecast(5.0 + 2 * 2, 0), "the other stream is free"
    chosen.reserve(ticket(1, 51.0, rows=256), 5.0)
    assert chosen.forecast(ticket(2, 99.0), 5.0) == Forecast(5.0 + 2 * (2 + 2), 0), "the first one ends first"
    # Before the others there is nothing.
    assert chosen.forecast(ticket(2, 40.0), 5.0).finish_s == 5.0 + 1.5


def test_a_forecast_while_every_stream_is_busy_is_a_careful_promise():
    chosen = exactly(streams=1)
    chosen.offer(ticket(0, 50.0), 5.0)
    run = chosen.next(5.0)
    assert chosen.running == 1
    assert chosen.forecast(ticket(1, 99.0), 5.5) == Forecast(5.5 + 2 * (1.5 + 2), 0), "1.5 s of the run are left"
    assert chosen.forecast(ticket(1, 99.0), 9.0) == Forecast(9.0 + 2 * 2, 0), "it takes longer than was predicted"
    chosen.finished(run, 9.0)
    assert chosen.running == 0


def test_a_forecast_while_every_stream_is_busy_is_split_where_that_ends_sooner():
    chosen = exactly(streams=2)
    chosen.offer(ticket(0, 50.0), 5.0)
    assert [chosen.next(5.0).pieces[0].rows for _ in range(2)] == [64, 64]
    assert chosen.forecast(ticket(1, 99.0), 5.5) == Forecast(5.5 + 2 * (1.0 + 1.5), 0)


def test_a_large_ticket_is_forecast_whole_as_it_leaves_a_stream_to_others():
    chosen = exactly(streams=2)
    chosen.offer(ticket(0, 50.0, rows=64, lane="home"), 5.0)
    chosen.cancel(ticket(0, rows=64))
    assert chosen.forecast(ticket(1, 99.0, rows=256, lane="bulk"), 5.0).finish_s == 5.0 + 3.0
    assert chosen.forecast(ticket(1, 99.0, rows=128, lane="bulk"), 5.0).finish_s == 5.0 + 1.5


@pytest.mark.parametrize(
    ("deadline_s", "harms"),
    [
        pytest.param(8.9, 0, id="late anyway"),
        pytest.param(9.0, 1, id="just in time without the newcomer"),
        pytest.param(10.9, 1, id="not in time with it"),
        pytest.param(11.0, 0, id="just in time with it"),
    ],
)
def test_a_forecast_counts_whom_the_newcomer_makes_late(deadline_s, harms):
    chosen = exactly(streams=1)
    chosen.reserve(ticket(0, deadline_s), 5.0)
    # The other is promised 4 s from now, and the newcomer takes 2 s.
    assert chosen.forecast(ticket(1, 6.0), 5.0).harms == harms


def test_each_that_waits_behind_a_newcomer_is_delayed_by_those_before_it_too():
    chosen = exactly(streams=2)
    chosen.reserve(ticket(0, 99.0), 5.0)
    chosen.reserve(ticket(1, 99.5, rows=384), 5.0)
    # One of two streams has the first; on the other, the second is promised 8 s: at 13 s. The newcomer takes 2 s there.
    for deadline_s, harms in ((12.9, 0), (13.0, 1), (14.9, 1), (15.0, 0)):
        other = exactly(streams=2)
        other.reserve(ticket(0, 13.0), 5.0)
        other.reserve(ticket(1, deadline_s, rows=384), 5.0)
        assert other.forecast(ticket(9, 1.0), 5.0).harms == harms, deadline_s


def test_a_forecast_of_a_ticket_that_waits_leaves_it_in_its_place():
    chosen = exactly()
    waits = ticket(0, 99.0)
    chosen.reserve(waits, 5.0)
    chosen.forecast(waits, 5.0)
    chosen.offer(waits, 5.0)
    assert chosen.next(5.0).pieces[0].ticket == waits
