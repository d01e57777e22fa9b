from __future__ import annotations

from collections import Counter

import pytest

from server.request.routing import ServedModels
from server.request.windows import Window, WindowSummary
from server.rollout.guard import Breach, Healthy, Limits, TooEarly, judge

USERS = range(20_000)


def assigned(traffic, labels=("stable", "canary", "beta")):
    models = ServedModels("stable")
    models.by_label = dict.fromkeys(labels)
    models.share_traffic(traffic)
    return [models.assigned("home", user) for user in USERS]


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        ({}, {"stable": 1.0}),
        ({"*": {"canary": 0.05}}, {"stable": 0.95, "canary": 0.05}),
        ({"home": {"canary": 0.3, "beta": 0.3}}, {"stable": 0.4, "canary": 0.3, "beta": 0.3}),
        ({"*": {"canary": 1.0}, "home": {"beta": 0.2}}, {"stable": 0.8, "beta": 0.2}),
        ({"*": {"canary": 1.0}}, {"canary": 1.0}),
        ({"*": {"gone": 0.5, "canary": 0.25}}, {"stable": 0.75, "canary": 0.25}),
        ({"related": {"canary": 1.0}}, {"stable": 1.0}),
    ],
)
def test_labels_get_their_shares_of_users(traffic, expected):
    counts = Counter(assigned(traffic))
    assert set(counts) == set(expected)
    for label, share in expected.items():
        assert counts[label] / len(USERS) == pytest.approx(share, abs=0.015)


def test_growing_a_share_keeps_its_users_and_takes_others_only_to_itself():
    before = assigned({"*": {"canary": 0.1, "beta": 0.2}})
    after = assigned({"*": {"canary": 0.1, "beta": 0.5}})
    for one, other in zip(before, after, strict=True):
        assert one == "stable" or other in {one, "beta"}
    alone = assigned({"*": {"canary": 0.1}})
    grown = assigned({"*": {"canary": 0.4}})
    for one, other in zip(alone, grown, strict=True):
        assert other in {one, "canary"}


LIMITS = Limits(requests_min=100, error_rate_max=0.01, p99_ratio_max=1.5, psi_max=0.5)


@pytest.mark.parametrize(
    ("own", "default", "moved", "kind", "text"),
    [
        (WindowSummary(99, 99, 0.0), WindowSummary(500, 0, 0.01), {}, TooEarly, "99 of 100 requests"),
        (WindowSummary(500, 0, 0.01), WindowSummary(20, 0, 0.01), {}, TooEarly, "20 of 100 requests"),
        (WindowSummary(200, 0, 0.01), WindowSummary(500, 0, 0.01), {"save": 0.1}, Healthy, "largest PSI 0.10"),
        (WindowSummary(200, 2, 0.01), WindowSummary(500, 0, 0.01), {}, Healthy, "errors 1.00%"),
        (
            WindowSummary(200, 3, 0.01),
            WindowSummary(500, 0, 0.01),
            {},
            Breach,
            "1.50% of its requests failed, against 0.00% of the default",
        ),
        (WindowSummary(200, 3, 0.01), WindowSummary(500, 5, 0.01), {}, Healthy, "errors 1.50% (1.00%)"),
        (
            WindowSummary(200, 0, 0.0151),
            WindowSummary(500, 0, 0.01),
            {},
            Breach,
            "its P99 is 15.1 ms, against the default label's 10.0 ms",
        ),
        (
            WindowSummary(200, 0, 0.01),
            WindowSummary(500, 0, 0.01),
            {"save": 0.1, "hide": 0.51},
            Breach,
            "its hide probabilities differ",
        ),
        (WindowSummary(200, 200, 0.0), WindowSummary(500, 0, 0.01), {}, Breach, "100.00% of its requests failed"),
    ],
)
def test_a_guard_judges_errors_time_and_drift_once_there_is_enough(own, default, moved, kind, text):
    verdict = judge(own, default, moved, LIMITS)
    assert isinstance(verdict, kind)
    assert text in (verdict.reason if isinstance(verdict, Breach) else verdict.note)


def test_a_window_forgets():
    window = Window(60.0)
    for second in range(300):
        window.note(second, 0.010 if second < 150 else 0.020, failed=second == 100)
        seen = window.seen(second)
        assert seen.requests <= 91
    assert (window.seen(299).errors, window.seen(299).p99_s) == (0, 0.020)
    assert window.seen(299).requests >= 60
    assert window.seen(1_000) == WindowSummary(0, 0, 0.0)
