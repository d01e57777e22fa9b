"""The benchmark of the join runs through, quickly: its times mean nothing here, what it counts does."""

from __future__ import annotations

from bench.harness import whole
from bench.impressions import join


def test_the_join_attributes_what_the_log_was_made_to_hold():
    raw = whole(join.measure(quick=True))
    small, large = raw["rounds"]
    assert (small["requests"], large["requests"]) == (1_000, 3_000)
    counts = large["counts"]
    assert counts["requests"] == 3_000
    assert counts["actions"] + large["repeated_actions"] == large["action_rows"]
    assert set(counts["unattributed"]) == {"pin_not_shown", "after_window"}
    assert counts["attributed"] > 0.9 * counts["actions"]
    assert large["bytes_max"] > 0
    assert len(join.conclude(raw).claims) == 2
    assert raw["tenth"]["counts"]["requests"] == 300
