"""Rates of new users and of a user's actions, without a store."""

from __future__ import annotations

import numpy as np

from feature_client.activity.limits import KeyedRates, Rate, WriteLimits


def test_a_bucket_admits_its_burst_and_then_its_rate():
    bucket = Rate(3.0)
    assert bucket.take(100, 1_000.0) == 30
    assert bucket.take(1, 1_000.0) == 0
    assert bucket.take(100, 1_001.0) == 3
    assert bucket.take(2, 1_002.0) == 2
    assert bucket.take(100, 2_000.0) == 30


def test_a_bucket_of_a_slow_rate_admits_one_at_once():
    bucket = Rate(0.01)
    assert [bucket.take(1, now_s) for now_s in (0.0, 50.0, 101.0, 202.0)] == [1, 0, 1, 1]


def test_a_clock_that_steps_back_takes_no_tokens_and_gives_none():
    bucket, rates = Rate(1.0), KeyedRates(1.0)
    keys, one = np.array([7], np.uint64), np.ones(1, np.int64)
    for now_s in (1_000.0, 900.0, 900.0):
        assert bucket.take(1, now_s) == 1
        assert rates.take(keys, one, now_s).tolist() == [1]
    assert bucket.take(100, 900.0) == 7
    assert rates.take(keys, 100 * one, 900.0).tolist() == [7]


def test_each_key_has_a_rate_of_its_own():
    rates = KeyedRates(2.0)
    keys = np.arange(100, dtype=np.uint64)
    # Of 100 keys, two share a place with a probability of 7%: at most a few are limited together.
    assert rates.take(keys, np.full(100, 20), 1_000.0).sum() == 2_000
    assert rates.take(keys, np.full(100, 20), 1_000.0).sum() == 0
    assert rates.take(keys, np.full(100, 20), 1_003.0).sum() >= 6 * 98


def test_who_shares_a_place_is_secret():
    """A caller that tries ids cannot know which exhaust the rate of another: the places depend on random numbers."""
    keys = np.arange(1_000, dtype=np.uint64)
    places = [KeyedRates(1.0)._places(keys) for _ in range(2)]
    assert (places[0] != places[1]).mean() > 0.99
    assert len(np.unique(places[0])) > 980


def test_a_rate_of_0_admits_everything():
    keys, many = np.array([7], np.uint64), np.array([10_000])
    assert Rate(0.0).take(10_000, 0.0) == 10_000
    assert KeyedRates(0.0).take(keys, many, 0.0).tolist() == [10_000]


def test_a_write_takes_what_it_was_granted_once_however_often_it_tries():
    limits = WriteLimits(new_users_per_s=0.2, user_actions_per_s=0.4)
    grants = limits.begin(np.array([10, 11, 12], np.uint64), 1_000.0)
    assert grants.new_users(np.array([2, 0])).tolist() == [True, True]
    for _ in range(3):
        assert grants.new_users(np.array([0, 1, 2])).tolist() == [True, False, True]
    assert grants.actions(np.array([0, 2]), np.array([3, 1])).tolist() == [3, 1]
    for _ in range(3):
        assert grants.actions(np.array([0, 2]), np.array([3, 1])).tolist() == [3, 1]
    assert grants.actions(np.array([0, 2]), np.array([2, 9])).tolist() == [2, 4]
    again = limits.begin(np.array([12, 10], np.uint64), 1_000.0)
    assert again.new_users(np.array([0])).tolist() == [False]
    assert again.actions(np.array([0, 1]), np.array([9, 9])).tolist() == [0, 1]
    later = limits.begin(np.array([12], np.uint64), 1_005.0)
    assert later.new_users(np.array([0])).tolist() == [True]
    assert later.actions(np.array([0]), np.array([9])).tolist() == [2]


def test_a_full_store_takes_no_tokens():
    limits = WriteLimits(new_users_per_s=0.1)
    limits.full = True
    assert limits.begin(np.array([1], np.uint64), 0.0).new_users(np.array([0])).tolist() == [False]
    limits.full = False
    assert limits.begin(np.array([1], np.uint64), 0.0).new_users(np.array([0])).tolist() == [True]


def test_without_limits_everything_is_granted():
    grants = WriteLimits().begin(np.arange(50_000, dtype=np.uint64), 0.0)
    everyone = np.arange(50_000)
    assert grants.new_users(everyone).all()
    assert grants.actions(everyone, np.full(50_000, 500)).sum() == 50_000 * 500
