"""A whole server with TLS: HTTPS on its HTTP port, certificates that change, and where it refuses to start."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request

import grpc.aio
import pytest

from pinrank.channels import open_aio_channel
from pinrank.tls import ClientTls
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.config import ConfigError
from server.runtime.listening import is_loopback
from tests.certificates import Authority, Mounted
from tests.conftest import eventually
from tests.server.edge.secured import hello

REQUEST = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def mounted(authority, tmp_path):
    return Mounted(tmp_path / "mounted", authority.server("first"), authority.file)


def settings(mounted, **changes):
    files = {"certificate": mounted.certificate, "key": mounted.key, "client_ca": mounted.client_ca}
    return files | {"reload_s": 0.02} | changes


async def get(server, path, authority):
    """Make a request over HTTPS; return its status, its body, and the serial number of the certificate."""

    def ask():
        context = ssl.create_default_context(cafile=authority.file)
        with (
            socket.create_connection(("127.0.0.1", server.http_port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as secured,
        ):
            secured.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            said = b"".join(iter(lambda: secured.recv(1 << 16), b""))
            head, _, body = said.partition(b"\r\n\r\n")
            return int(head.split()[1]), body.decode(), secured.getpeercert()["serialNumber"]

    return await asyncio.to_thread(ask)


async def test_both_ports_speak_tls_and_only_grpc_wants_a_client_certificate(start_server, authority, mounted):
    server = await start_server(tls=settings(mounted))
    pair = authority.client()
    tls = ClientTls(str(authority.file), pair.certificate, pair.key)
    async with open_aio_channel(f"localhost:{server.grpc_port}", tls=tls) as channel:
        answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(REQUEST, timeout=20)
    assert sorted(answer.pin_ids) == [1, 2, 3]
    status, body, _ = await get(server, "/healthz", authority)
    assert (status, body.splitlines()[0]) == (200, "serving")
    assert "tls-certificates: running" in body
    status, body, serial = await get(server, "/metrics", authority)
    assert status == 200
    assert f'pinrank_tls_certificate_expiry_seconds{{serial="{serial}"}}' in body
    with pytest.raises(OSError, match="."):
        await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{server.http_port}/healthz", timeout=30)


async def test_new_certificates_are_served_by_both_ports(start_server, authority, mounted):
    server = await start_server(tls=settings(mounted, client_certificates="off"))
    second = authority.server("second")
    tls = ClientTls(str(authority.file))
    async with open_aio_channel(f"localhost:{server.grpc_port}", tls=tls) as lasting:
        await ranking_pb2_grpc.RankingServiceStub(lasting).Rank(REQUEST, timeout=20)
        mounted.show(second, authority.file)
        await eventually(lambda: server.metrics.value("pinrank_tls_reloads_total", outcome="done") == 1)
        assert (await get(server, "/healthz", authority))[2] == second.serial
        async with open_aio_channel(f"localhost:{server.grpc_port}", tls=tls) as channel:
            await ranking_pb2_grpc.RankingServiceStub(channel).Rank(REQUEST, timeout=20)
        await ranking_pb2_grpc.RankingServiceStub(lasting).Rank(REQUEST, timeout=20)


async def test_http_clients_that_do_not_finish_their_handshake_hold_up_nobody(start_server, authority, mounted):
    server = await start_server(tls=settings(mounted))
    slow = [socket.create_connection(("127.0.0.1", server.http_port), timeout=60) for _ in range(10)]
    for one in slow:
        one.sendall(hello()[:100])
    assert (await get(server, "/healthz", authority))[0] == 200
    for one in slow:
        one.close()


async def test_the_health_check_of_the_image_asks_https(start_server, mounted):
    server = await start_server(tls=settings(mounted))
    around = mounted.environment | {"PINRANK_HTTP_PORT": str(server.http_port), "PATH": os.environ["PATH"]}
    for environment, code in ((around, 0), (around | {"PINRANK_TLS__CERTIFICATE": ""}, 1)):
        asked = await asyncio.create_subprocess_exec(
            *[sys.executable, "-P", "-m", "server.cli.health"], env=environment,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert await asked.wait() == code


@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
async def test_without_tls_a_server_does_not_listen_beyond_its_machine_unless_told_to(start_server, host):
    with pytest.raises(ConfigError, match=r"set insecure = true \(--insecure, PINRANK_INSECURE=true\)"):
        await start_server(host=host)
    server = await start_server(host=host, insecure=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        await ranking_pb2_grpc.RankingServiceStub(channel).Rank(REQUEST, timeout=20)


async def test_a_server_can_be_told_never_to_do_without_tls(start_server):
    with pytest.raises(ConfigError, match=r"Set tls\.certificate and tls\.key"):
        await start_server(insecure=False)


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("unix:/run/p", True), ("0.0.0.0", False)],
)
def test_hosts_that_only_this_machine_can_reach(host, is_it):
    assert is_loopback(host) == is_it


async def test_a_pair_that_cannot_be_served_ends_the_start(start_server, authority, mounted):
    other = authority.server("other")
    with pytest.raises(ConfigError, match=r"tls\.certificate: .*KEY_VALUES_MISMATCH"):
        await start_server(tls=settings(mounted, key=other.key))


async def test_a_key_that_every_user_can_read_is_logged(start_server, authority, capfd):
    pair = authority.server()
    for mode, lines in ((0o600, 0), (0o644, 1)):
        pair.key.chmod(mode)
        await start_server(tls={"certificate": pair.certificate, "key": pair.key}, feature_store="memory://")
        assert capfd.readouterr().out.count("tls_key_readable_by_all") == lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_certificates": "ask"}, "cannot ask for certificates without requiring them"),
        ({"minimum": "1.3"}, "takes TLS 1.2, too"),
    ],
)
async def test_what_grpcio_cannot_do_is_refused_by_name(start_server, mounted, changes, message):
    with pytest.raises(ConfigError, match=message):
        await start_server(tls=settings(mounted, **changes), grpc_edge="grpcio")
