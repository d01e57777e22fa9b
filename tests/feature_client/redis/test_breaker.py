from __future__ import annotations

import random

from feature_client.stores.redis.breaker import Breaker


def opened(now_s=0.0):
    breaker = Breaker(random.Random(1))
    for _ in range(3):
        assert breaker.allows(now_s, 1.0)
        breaker.failed(now_s)
    assert breaker.open
    return breaker


def next_probe_s(breaker, now_s):
    """When it lets the next read through, to a millisecond."""
    while not breaker.allows(now_s, 1.0):
        now_s += 1e-3
    return now_s


def test_two_failures_between_successes_keep_it_closed():
    breaker = Breaker()
    for _ in range(10):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
        assert not breaker.open


def test_open_it_lets_one_probe_through_after_a_pause():
    breaker = opened()
    assert not breaker.allows(0.0, 1.0)
    probe_s = next_probe_s(breaker, 0.0)
    assert 0.05 <= probe_s <= 0.152
    assert not breaker.allows(probe_s, 1.0), "a second read while the probe is out"
    breaker.succeeded()
    assert all(breaker.allows(probe_s, 1.0) for _ in range(5))


def test_pauses_grow_to_a_bound_and_shrink_again_after_a_success():
    breaker, now_s, pauses = opened(), 0.0, []
    for _ in range(12):
        probe_s = next_probe_s(breaker, now_s)
        pauses.append(probe_s - now_s)
        breaker.failed(probe_s)
        now_s = probe_s
    assert max(pauses) <= 4.51
    assert min(pauses[6:]) >= 1.49
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(now_s)
    assert next_probe_s(breaker, now_s) - now_s <= 0.152


def test_a_probe_of_which_nothing_is_heard_is_forgotten():
    breaker = opened()
    probe_s = next_probe_s(breaker, 0.0)
    assert not breaker.allows(probe_s + 0.9, 1.0)
    assert breaker.allows(probe_s + 1.1, 1.0)


def test_two_clients_do_not_probe_together():
    pauses = set()
    for seed in range(20):
        breaker = Breaker(random.Random(seed))
        for _ in range(3):
            breaker.failed(0.0)
        pauses.add(round(next_probe_s(breaker, 0.0), 3))
    assert len(pauses) > 10
