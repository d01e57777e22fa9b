from __future__ import annotations

import numpy as np

from server.runner import Slowdown


def test_settles_above_most_runs_and_follows_them_down_again():
    slowdown, rng = Slowdown(), np.random.default_rng(0)
    ratios = rng.lognormal(0.3, 0.2, 2000)
    for ratio in ratios:
        slowdown.observe(0.005, 0.005 * ratio)
    assert np.quantile(ratios, 0.6) < slowdown.factor < np.quantile(ratios, 0.95)
    for _ in range(500):
        slowdown.observe(0.005, 0.005)
    assert slowdown.factor < 1.001


def test_outliers_and_unknown_costs_cannot_make_a_server_refuse_everything():
    slowdown = Slowdown()
    slowdown.observe(0.0, 1.0)
    assert slowdown.factor == 1.0
    for _ in range(1000):
        slowdown.observe(0.001, 60.0)
    assert slowdown.factor <= 4.0
    slowdown.observe(0.001, 0.0)
    assert slowdown.factor >= 1.0
