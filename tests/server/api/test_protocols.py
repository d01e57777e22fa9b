"""What else the ports answer: health, reflection, metrics; and what a server refuses to start with."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from kernels.native.library import NativeLibraryError
from model_store.bundle.files import BundleError
from model_store.model.utility import UtilityError
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import open_model_store
from pinrank.answers import STAGES
from pinrank.channels import open_aio_channel
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.app import StartError
from server.cli import health
from server.config import ConfigError, ServerConfig
from server.config_sections import HttpConfig, SurfaceConfig


async def get(server, path, host="127.0.0.1"):
    def read():
        try:
            with urllib.request.urlopen(f"http://{host}:{server.http_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(read)


async def test_health_service_says_serving(channel):
    for service in ("", "pinrank.v1.RankingService"):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_method_of_the_health_service_that_its_package_lacks_is_unknown_and_no_failure(channel):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


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
    assert {key[1] for key in found if key[0] == "pinrank_stage_seconds_count"} == {*STAGES, "response"}
    for stage in ("wire", "fetch", "assemble", "queue", "score", "utility", "select", "response"):
        assert found["pinrank_stage_seconds_count", stage] == 3
    digest = server.status.default.model.digest
    assert found["pinrank_model_info", digest, "stable", "tiny", "1"] == 1


async def test_healthz_follows_the_server(server):
    status, body = await get(server, "/healthz")
    assert (status, body.splitlines()[0]) == (200, "serving")
    server.state.serving = False
    status, body = await get(server, "/healthz")
    assert (status, body.splitlines()[0]) == (503, "not serving")
    server.state.serving = True
    assert (await get(server, "/nothing"))[0] == 404


async def test_health_check_of_the_image_asks_the_server_itself_whatever_the_surroundings_say(server, capfd):
    command = [sys.executable, "-P", "-m", "server.cli.health"]
    port = str(server.http_port)
    around = {**os.environ, "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    for changes in ({"PINRANK_HTTP_PORT": port}, {"PINRANK_HTTP_PORT": port, "PINRANK_HOST": "::"}):
        asked = await asyncio.create_subprocess_exec(*command, env=around | changes)
        assert await asked.wait() == 0
    server.state.serving = False
    asked = await asyncio.create_subprocess_exec(*command, env=around | {"PINRANK_HTTP_PORT": port})
    assert await asked.wait() == 1
    server.state.serving = True
    said = capfd.readouterr().err
    assert "503" in said
    assert "\nnot serving\n" in said


@pytest.mark.parametrize(
    ("port", "host", "url"),
    [
        ("", "", "http://127.0.0.1:9095/healthz"),
        ("tcp://10.0.0.1:80", "0.0.0.0", "http://127.0.0.1:9095/healthz"),
        ("90", "::1", "http://[::1]:90/healthz"),
        ("90", "10.0.0.1", "http://10.0.0.1:90/healthz"),
        ("90", "unix:/run/p.sock", "http://127.0.0.1:90/healthz"),
    ],
)
def test_health_check_asks_where_the_server_listens(monkeypatch, port, host, url):
    monkeypatch.setenv("PINRANK_HTTP_PORT", port)
    monkeypatch.setenv("PINRANK_HOST", host)
    assert health.url() == url


def test_health_check_takes_what_the_settings_say_by_default():
    assert [ServerConfig.model_fields[name].default for name in ("host", "http_port")] == [
        health.DEFAULT_HOST,
        health.DEFAULT_PORT,
    ]


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


V4, V6 = ["127.0.0.1"], ["[::1]"] if has_ipv6() else []


@pytest.mark.parametrize(
    ("host", "answering"),
    [
        ("::", V4 + V6), ("[::]", V4 + V6), ("0.0.0.0", V4 + V6), ("127.0.0.1", V4), ("localhost", ["localhost"]),
        *((host, V6) for host in ("::1", "[::1]") if V6),
    ],
)  # fmt: skip
async def test_both_ports_listen_on_what_the_host_says(start_server, monkeypatch, capfd, host, answering):
    monkeypatch.setattr("socket.getfqdn", None)  # nothing may ask the DNS what this machine is called
    server = await start_server(host=host, insecure=True)
    logged = re.search(r" grpc=(\S+) http=(\S+)", capfd.readouterr().out)
    for form in answering:
        async with open_aio_channel(f"{form}:{server.grpc_port}") as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        status, said = await get(server, "/healthz", form)
        assert (status, said.partition("\n")[0]) == (200, "serving")
    async with open_aio_channel(logged[1]) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert logged[2] == logged[1].replace(str(server.grpc_port), str(server.http_port))


async def test_a_unix_socket_is_the_grpc_port_and_http_is_on_loopback(start_server, tmp_path):
    path = tmp_path / "pinrank.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # what a server that was killed leaves behind
    server = await start_server(host=f"unix:{path}")
    async with open_aio_channel(f"unix:{path}") as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    status, said = await get(server, "/healthz")
    assert (status, said.partition("\n")[0]) == (200, "serving")
    with pytest.raises(StartError, match=f"cannot listen on {path}: another server is using it"):
        await start_server(host=f"unix:{path}", feature_store="memory://")
    await server.drain_and_close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(StartError, match=f"cannot listen on {path}: the path exists and is not a socket"):
        await start_server(host=f"unix:{path}")
    assert path.read_text() == "precious"
    with pytest.raises(StartError, match="is not a folder, or the server may not write to it"):
        await start_server(host=f"unix:{tmp_path}/absent/pinrank.sock")


async def test_a_host_that_this_machine_does_not_have_is_named(start_server):
    with pytest.raises(StartError, match="host '192.0.2.1': this machine has no such address"):
        await start_server(host="192.0.2.1")
    with pytest.raises(StartError, match="host 'nowhere.invalid': the name does not resolve"):
        await start_server(host="nowhere.invalid")


async def test_without_its_library_the_native_edge_is_replaced_openly_or_refused_by_name(
    start_server, monkeypatch, capfd
):
    def missing(*_, **__):
        raise NativeLibraryError("libpinrank_http2.so cannot be loaded; install libnghttp2-dev and reinstall pinrank")

    monkeypatch.setattr("server.edge.endpoints.NativeEndpoint", missing)
    with pytest.raises(ConfigError, match="grpc_edge: .* install libnghttp2-dev .* or set grpc_edge to auto or grpcio"):
        await start_server(grpc_edge="native")
    server = await start_server()
    assert "grpc_edge_not_native" in capfd.readouterr().out
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
        answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=30)
    assert sorted(answer.pin_ids) == [1, 2, 3]


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


async def test_half_open_http_connection_is_closed_in_silence(start_server, capfd):
    server = await start_server(http=HttpConfig(request_s_max=0.2))
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
