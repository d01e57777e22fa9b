from __future__ import annotations

import pytest

from bench.edges import rolling_restart, tls
from bench.edges.edges import conclude, measure
from bench.harness import whole
from tests.proxied import why_not
from tests.server.edges import needs_native_edge


@needs_native_edge
def test_servers_that_are_not_installed_are_left_out(tmp_path):
    raw = whole(measure(quick=True, environments=tmp_path))
    (only,) = raw["rounds"]
    assert list(only) == ["the native edge", "grpc.aio of today"]
    assert len(raw["missing"]) == 3
    assert only["grpc.aio of today"]["versions"]["grpcio"]
    assert conclude(raw).summary["grpc.aio of today, saturated, calls/s"] > 0


def test_a_quick_run_measures_servers_with_and_without_tls(config_file):
    raw = whole(tls.measure(quick=True, config=config_file))
    names = [tls.PLAIN, tls.TLS, tls.MUTUAL]
    assert [one["order"] for one in raw["rounds"]] == [names]
    found = tls.conclude(raw)
    assert all(found.summary.values())
    assert [claim.target for claim in found.claims] == [1.05, 1.05]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_quick_run_restarts_servers_and_counts_what_failed(config_file):
    raw = whole(rolling_restart.measure(quick=True, config=config_file))
    found = rolling_restart.conclude(raw)
    assert (found.summary["requests"], found.summary["failed"]) == (rolling_restart.QUICK.requests, 0)
    assert raw["restarts"] > 0
    raw["statuses"]["UNAVAILABLE"] = 3
    (claim,) = rolling_restart.conclude(raw | {"restarts": 2}).claims
    assert (claim.measured, claim.holds) == (3, False)
    (claim,) = rolling_restart.conclude(raw | {"restarts": 1}).claims
    assert claim.measured is None
