from __future__ import annotations

import pytest

from server.request.windows import Window, WindowSummary


def window(*notes):
    """Return a window of 4 seconds, each half of which lasts 2, after (now_s, seconds, failed)."""
    filled = Window(4.0)
    for now_s, seconds, failed in notes:
        filled.note(now_s, seconds, failed=failed)
    return filled


def test_an_empty_window_has_seen_nothing():
    assert window().seen(0.0) == WindowSummary(requests=0, errors=0, p99_s=0.0)


def test_a_failed_request_counts_once_and_its_time_does_not():
    seen = window((0.0, 0.25, False), (0.5, 9.0, True), (1.0, 9.0, True)).seen(1.0)
    assert seen == WindowSummary(requests=3, errors=2, p99_s=0.25)


def test_failed_requests_alone_have_no_p99():
    assert window((0.0, 9.0, True)).seen(0.0) == WindowSummary(requests=1, errors=1, p99_s=0.0)


def test_99_of_a_hundred_times_are_below_the_p99():
    filled = window(*((0.0, float(second), False) for second in range(101)))
    assert filled.seen(0.0) == WindowSummary(requests=101, errors=0, p99_s=pytest.approx(99.0))


def test_a_request_is_counted_in_the_half_of_its_time():
    filled = window((0.0, 0.25, False), (1.5, 0.5, False), (2.0, 0.75, False))
    assert [filled.seen(now_s).requests for now_s in (2.0, 5.5, 6.0, 7.5, 8.0)] == [3, 3, 1, 1, 0]


def test_a_half_stays_until_its_last_request_may_be_older_than_the_window():
    filled = window((0.0, 0.25, False), (1.5, 0.5, False), (5.5, 0.75, False))
    assert filled.seen(5.5) == WindowSummary(requests=3, errors=0, p99_s=pytest.approx(0.745))
    filled.note(7.5, 1.0, failed=False)
    assert filled.seen(7.5).requests == 2


def test_requests_of_a_later_half_are_noted_there():
    filled = window((0.0, 0.25, False), (2.0, 0.5, True), (2.5, 0.5, True))
    assert filled.seen(6.0) == WindowSummary(requests=2, errors=2, p99_s=0.0)
    assert filled.seen(8.0).requests == 0
