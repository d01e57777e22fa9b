from __future__ import annotations

from types import SimpleNamespace

import pytest

from server.rollout.guard import Breach, Healthy, Limits, TooEarly, judge

LIMITS = Limits(requests_min=100, error_rate_max=0.25, p99_ratio_max=1.5, psi_max=0.5)


def summary(requests=128, errors=0, p99_s=0.5):
    return SimpleNamespace(requests=requests, errors=errors, p99_s=p99_s)


@pytest.mark.parametrize(
    ("own", "default", "moved", "verdict"),
    [
        pytest.param(summary(99), summary(), {}, TooEarly("99 of 100 requests"), id="too few of its own"),
        pytest.param(summary(), summary(98), {}, TooEarly("98 of 100 requests"), id="too few of the default's"),
        pytest.param(
            summary(100), summary(100), {}, Healthy("errors 0.00% (0.00%), P99 500.0 ms (500.0), largest PSI 0.00"),
            id="just enough",
        ),
        pytest.param(
            summary(errors=64, p99_s=0.75), summary(errors=32), {"save": 0.5, "hide": 0.25},
            Healthy("errors 50.00% (25.00%), P99 750.0 ms (500.0), largest PSI 0.50"), id="every limit reached",
        ),
        pytest.param(
            summary(errors=65), summary(errors=32), {},
            Breach("50.78% of its requests failed, against 25.00% of the default label's; the limit is 25.00% more"),
            id="one more error",
        ),
        pytest.param(
            summary(p99_s=0.7501), summary(), {},
            Breach("its P99 is 750.1 ms, against the default label's 500.0 ms; the limit is 1.5 times as much"),
            id="too slow",
        ),
        pytest.param(
            summary(p99_s=9.0), summary(p99_s=0.0), {},
            Healthy("errors 0.00% (0.00%), P99 9000.0 ms (0.0), largest PSI 0.00"), id="nothing to be slower than",
        ),
        pytest.param(
            summary(), summary(), {"save": 0.25, "hide": 0.51},
            Breach("its hide probabilities differ from the default label's by 0.51 (PSI); the limit is 0.5"),
            id="moved",
        ),
    ],
)  # fmt: skip
def test_a_label_is_judged_against_the_default_label(own, default, moved, verdict):
    assert judge(own, default, moved, LIMITS) == verdict
