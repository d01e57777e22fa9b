"""What else the ports answer: health, reflection, metrics; and what a server refuses to start with."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from model_store.bundle import BundleError
from model_store.objects import ModelStoreError
from model_store.store import open_model_store
from model_store.utility import UtilityError
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.app import StartError
from server.config import ConfigError, SurfaceConfig


async def get(server, path):
    def read():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(read)


async def test_health_service_says_serving(channel):
    for service in ("", "pinrank.v1.RankingService"):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_describes_the_ranking_service(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="pinrank.v1.RankingService")
    call = stub.ServerReflectionInfo(iter([request]))
    answer = await call.read()
    assert ranking_pb2.DESCRIPTOR.serialized_pb in answer.file_descriptor_response.file_descriptor_proto
    call.cancel()


async def test_metrics_count_what_was_answered(channel, server):
    stub = ranking_pb2_grpc.RankingServiceStub(channel)
    for user in (1, 2, 999):
        await stub.Rank(ranking_pb2.RankRequest(user_id=user, pin_ids=[1, 2, 3], surface="home"))
    status, text = await get(server, "/metrics")
    assert status == 200
    found = {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["pinrank_requests_total", "OK", "home"] == 3
    assert found["pinrank_candidates_sum",] == 9
    assert found["pinrank_degraded_total", "user_missing"] == 1
    assert found["pinrank_requests_in_flight",] == 0
    for stage in ("wire", "fetch", "assemble", "queue", "score", "utility", "select", "response"):
        assert found["pinrank_stage_seconds_count", stage] == 3
    digest = server._models.default.live.digest
    assert found["pinrank_model_info", digest, "stable", "tiny", "1"] == 1


async def test_healthz_follows_the_server(server):
    status, body = await get(server, "/healthz")
    assert (status, body.splitlines()[0]) == (200, "serving")
    server.serving = False
    status, body = await get(server, "/healthz")
    assert (status, body.splitlines()[0]) == (503, "not serving")
    server.serving = True
    assert (await get(server, "/nothing"))[0] == 404


async def test_taken_ports_are_named(server, start_server):
    with pytest.raises(StartError, match=rf"{server.grpc_port}.*grpc_port"):
        await start_server(grpc_port=server.grpc_port, feature_store="memory://")
    with pytest.raises(StartError, match=rf"{server.http_port}.*http_port"):
        await start_server(http_port=server.http_port, feature_store="memory://")


async def test_unknown_label_model_and_surface_are_fatal_and_named(start_server):
    with pytest.raises(ModelStoreError, match=r"no label 'beta' \(labels: canary, stable\)"):
        await start_server(labels=("beta",))
    with pytest.raises(ModelStoreError, match="other"):
        await start_server(model="other")
    with pytest.raises(ConfigError, match=r"surfaces.shop: no served model ranks this surface"):
        await start_server(surfaces={"shop": SurfaceConfig()})


async def test_bad_utility_and_damaged_bundle_are_fatal_and_named(start_server, tmp_path, model_store):
    utility = tmp_path / "utility.toml"
    utility.write_text("surfaces = {}")
    with pytest.raises(UtilityError, match="surfaces"):
        await start_server(utility=utility)
    copy = tmp_path / "models"
    await asyncio.to_thread(__import__("shutil").copytree, model_store, copy)
    network = open_model_store(copy).manifest("tiny", 1).files["network.onnx"].sha256
    (copy / "tiny" / "blobs" / network).write_bytes(b"")
    with pytest.raises(BundleError, match=r"tiny@1: network.onnx was changed or damaged"):
        await start_server(model_store=str(copy))


async def test_half_open_http_connection_is_closed_in_silence(server, monkeypatch, capfd):
    monkeypatch.setattr("server.http._Quiet.timeout", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    writer.write(b"GET /metr")
    async with asyncio.timeout(10):
        await reader.read()  # until the server hangs up
    writer.close()
    assert (await get(server, "/healthz"))[0] == 200
    output = capfd.readouterr()
    assert "Traceback" not in output.err + output.out
    assert "http_failed" not in output.err + output.out


async def test_drain_does_not_wait_for_health_watchers(start_server):
    server = await start_server(drain_s=600)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(60):
            await server.drain_and_close()
        watch.cancel()
