"""The feature benchmarks run through, quickly: their numbers mean nothing here, what they count does."""

from __future__ import annotations

from pathlib import Path

from bench.embeddings import walks
from bench.features import actions, bulk_load, feature_reads, near_cache
from bench.harness import whole
from bench.serving import faults, recording


def test_no_action_is_lost_or_doubled_when_servers_and_followers_are_killed(config_file):
    raw = whole(actions.measure(quick=True, config=config_file))
    assert raw["rpc"]["wrong_users"] == 0
    assert raw["stream"]["wrong_users"] == 0
    assert raw["rpc"]["rank_failures_while_up"] == 0


def test_every_way_to_read_is_timed_and_a_missing_feast_is_no_measurement(config_file):
    raw = whole(feature_reads.measure(quick=True, config=config_file, feast_python=Path("/nowhere")))
    (found,) = raw["rounds"]
    assert found["feast"] is None
    assert all(found[way]["p50_ms"] > 0 for way in ("cold", "cached", "redis_py", "bytes_alone"))
    claims = {claim.name: claim for claim in feature_reads.conclude(raw).claims}
    assert not claims["Feast's read over ours, cold"].holds
    assert claims["Feast's read over ours, cold"].unjudged == "Feast is not installed"


def test_hit_rates_are_between_nothing_and_the_optimum():
    raw = whole(near_cache.measure(quick=True))
    (found,) = raw["found"]
    for way in ("near_cache", "s3_fifo", "lru"):
        assert 0 < found[way] <= found["optimum"] + 0.1
    assert all(timed["native"] > 0 and timed["numpy"] > 0 for timed in raw["lookups"])


def test_no_call_fails_while_redis_misbehaves(config_file):
    raw = whole(faults.measure(quick=True, config=config_file))
    for name, found in raw["faults"].items():
        assert found["errors_during"] == 0, name
        assert found["requests_during"] > 0, name
        assert found["degraded_during"] > 0.5, name


def test_bulk_loads_are_verified_and_timed_beside_a_plain_client():
    raw = whole(bulk_load.measure(quick=True))
    assert all(rate > 0 for rate in raw["rounds"][0].values())


def test_walks_are_timed_and_their_memory_is_taken():
    raw = whole(walks.measure(quick=True))
    for found in (raw["whole"], *raw["growing"]):
        assert found["graph_bytes"] > 0
        assert 10e6 < found["peak_own_bytes"] <= found["peak_bytes"]
    raw["whole"]["seconds"] = 660
    late, *others = walks.conclude(raw).claims
    assert (late.measured, late.holds) == (11, False)
    assert all(claim.measured for claim in others)


def test_rankings_are_timed_with_and_without_long_records(config_file):
    raw = whole(recording.measure(quick=True, config=config_file))
    (found,) = raw["rounds"]["redis"]
    # On a busy machine some rankings are refused, as they would be late.
    assert "OK" in found["without"]["statuses"]
    assert "OK" in found["beside"]["statuses"]
    assert found["record_s"]
    assert raw["held_ms"]["redis"][0] > 0
