from __future__ import annotations

from bench.edges.edges import conclude, measure
from bench.harness import whole
from tests.server.edges import needs_native_edge


@needs_native_edge
def test_servers_that_are_not_installed_are_left_out(tmp_path):
    raw = whole(measure(quick=True, environments=tmp_path))
    (only,) = raw["rounds"]
    assert list(only) == ["the native edge", "grpc.aio of today"]
    assert len(raw["missing"]) == 3
    assert only["grpc.aio of today"]["versions"]["grpcio"]
    assert conclude(raw).summary["grpc.aio of today, saturated, calls/s"] > 0
