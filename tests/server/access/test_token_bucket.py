from __future__ import annotations

import pytest

from server.access.token_bucket import TokenBucket


def test_a_full_bucket_gives_its_burst_at_once_and_then_the_rate():
    bucket = TokenBucket(10.0, 0.5, 100.0)
    for _ in range(5):
        assert bucket.wait_s(1, 100.0) == 0
        bucket.take(1)
    assert bucket.wait_s(1, 100.0) == pytest.approx(0.1)
    assert bucket.wait_s(1, 100.1) == pytest.approx(0, abs=1e-9)
    assert bucket.wait_s(5, 100.1) == pytest.approx(0.4)


def test_it_never_holds_more_than_its_burst():
    bucket = TokenBucket(10.0, 0.5, 0.0)
    assert bucket.wait_s(5, 1e6) == 0
    bucket.take(5)
    assert bucket.wait_s(1, 1e6) == pytest.approx(0.1)


def test_what_is_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt():
    bucket = TokenBucket(100.0, 1.0, 0.0)
    assert bucket.wait_s(250, 0.0) == 0
    bucket.take(250)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.51)
    assert bucket.wait_s(250, 2.0) == pytest.approx(0.5)


def test_a_slow_bucket_holds_one_token_at_least():
    bucket = TokenBucket(0.01, 1.0, 0.0)
    assert bucket.wait_s(1, 0.0) == 0
    bucket.take(1)
    assert bucket.wait_s(1, 0.0) == pytest.approx(100)


def test_time_that_runs_backwards_is_no_time():
    bucket = TokenBucket(10.0, 0.1, 5.0)
    bucket.take(1)
    assert bucket.wait_s(1, 4.0) == pytest.approx(0.1)
    assert bucket.wait_s(1, 5.05) == pytest.approx(0.05)
