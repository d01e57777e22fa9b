"""Certificates that are replaced while clients connect and call."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import grpc
import grpc.aio
import pytest

from server.edge.certificate_watch import CertificateWatch
from server.edge.native_endpoint import NativeEndpoint
from server.runtime.supervisor import Supervisor
from server.runtime.tls import TlsFiles
from tests.certificates import Authority, Mounted, Pair
from tests.conftest import eventually
from tests.server.edge.secured import SecuredPort, client_context
from tests.server.edges import EDGES, needs_native_edge

EVENT_LOOPS = ("asyncio", "uvloop")
RELOADS = "pinrank_tls_reloads_total"


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def mounted(authority, tmp_path):
    return Mounted(tmp_path / "mounted", authority.server("first"), authority.file)


@pytest.fixture
async def watched(mounted):
    """Start edges that follow the mounted files; stop them at the end."""
    async with contextlib.AsyncExitStack() as opened:

        async def start(kind, clients="off", host="127.0.0.1", interval_s=0.01):
            files = TlsFiles(mounted.certificate, mounted.key, mounted.client_ca, clients)
            port = await SecuredPort(kind, files).start(host)
            opened.push_async_callback(port.endpoint.stop)
            watch = CertificateWatch(port.certificates, port.metrics.tls, Supervisor(), interval_s)
            watch.start()
            opened.push_async_callback(watch.close)
            return port, watch

        yield start


def serial_shown(port, authority):
    """Return the serial number of the certificate that a new client is shown."""
    with (
        socket.create_connection(("127.0.0.1", port.port), timeout=30) as plain,
        client_context(authority).wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.getpeercert()["serialNumber"]


async def shows(port, authority, pair):
    """Wait until new clients are shown a certificate."""
    async with asyncio.timeout(20):
        while await asyncio.to_thread(serial_shown, port, authority) != pair.serial:
            pass


@pytest.mark.parametrize("kind", EDGES)
async def test_no_call_fails_while_certificates_are_swapped_under_load(watched, authority, mounted, kind):
    port, _ = await watched(kind)
    pairs = [authority.server(f"pair-{i}") for i in range(20)]
    answered = {"new channels": 0, "one channel": 0}
    swapping = True

    async def call(channel):
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=30) == b"ba"

    async def on_new_channels():
        while swapping:
            async with port.channel(authority.file) as channel:
                await call(channel)
            answered["new channels"] += 1

    async def on_one_channel(channel):
        while swapping:
            await call(channel)
            answered["one channel"] += 1

    async with port.channel(authority.file) as lasting:
        await call(lasting)
        callers = asyncio.gather(*(on_new_channels() for _ in range(4)), *(on_one_channel(lasting) for _ in range(4)))
        for pair in pairs:
            before = dict(answered)
            mounted.show(pair, authority.file)
            await shows(port, authority, pair)
            await eventually(lambda: callers.done() or all(answered[name] > before[name] for name in answered))  # noqa: B023
        swapping = False
        await callers
        await call(lasting)
    # The lasting channel kept its connection; every other one was new.
    assert len({peer for _, peer, _ in port.service.contexts}) == answered["new channels"] + 1
    assert port.metrics.value(RELOADS, outcome="done") == 20
    assert port.metrics.value(RELOADS, outcome="refused") == 0
    expiry = port.certificates.current.expires_at_s
    assert port.metrics.value("pinrank_tls_certificate_expiry_seconds", serial=pairs[-1].serial) == expiry
    assert port.metrics.value("pinrank_tls_certificate_expiry_seconds", serial=pairs[-2].serial) is None


@pytest.mark.parametrize("kind", EDGES)
async def test_a_broken_pair_is_refused_once_and_the_old_one_goes_on(watched, authority, mounted, kind, capfd):
    port, watch = await watched(kind)
    served, other = port.certificates.current, authority.server("other")
    mounted.show(Pair(other.certificate, mounted.key, ""), authority.file)
    await eventually(lambda: port.metrics.value(RELOADS, outcome="refused") == 1)
    await watch.look()
    async with port.channel(authority.file) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
    assert await asyncio.to_thread(serial_shown, port, authority) == served.serial
    assert port.metrics.value(RELOADS, outcome="refused") == 1
    said = capfd.readouterr().out
    assert said.count("tls_certificate_refused") == 1
    assert "KEY_VALUES_MISMATCH" in said
    mounted.show(other, authority.file)
    await shows(port, authority, other)


@pytest.mark.parametrize("kind", EDGES)
async def test_the_authority_of_clients_is_replaced_and_connections_go_on(watched, authority, mounted, tmp_path, kind):
    port, _ = await watched(kind, "require")
    former, later = authority.client(), Authority(tmp_path / "later", "later")
    present, pair = later.client(), authority.server("second")
    async with port.channel(authority.file, former) as lasting:
        assert await lasting.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
        mounted.show(pair, later.file)
        await eventually(lambda: port.metrics.value(RELOADS, outcome="done") == 1)
        async with port.channel(authority.file, present) as channel:
            assert await channel.unary_unary("/test/WhoAmI")(b"", timeout=20) == b"frontend|"
        async with port.channel(authority.file, former) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/test/Reverse")(b"ab", timeout=20)
        assert await lasting.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"


@needs_native_edge
async def test_a_server_on_a_unix_socket_keeps_its_path_when_its_certificate_is_replaced(
    watched, authority, mounted, tmp_path
):
    port, _ = await watched(NativeEndpoint, host=f"unix:{tmp_path}/socket")
    mounted.show(authority.server("second"), authority.file)
    await eventually(lambda: port.metrics.value(RELOADS, outcome="done") == 1)
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    name = [("grpc.ssl_target_name_override", "localhost")]
    async with grpc.aio.secure_channel(f"unix:{tmp_path}/socket", credentials, name) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
    await port.endpoint.stop()
    assert not (tmp_path / "socket").exists()


@needs_native_edge
async def test_clients_that_wait_to_be_accepted_are_not_lost_and_see_the_new_certificate(watched, authority, mounted):
    """They connect while the event loop is busy, and the certificate is replaced before they are accepted."""
    port, _ = await watched(NativeEndpoint, interval_s=3_600)
    mounted.show(authority.server("second"), authority.file)
    waiting = [socket.create_connection(("127.0.0.1", port.port), timeout=30) for _ in range(50)]
    port.certificates.renew()

    def serials():
        found = set()
        for plain in waiting:
            with client_context(authority).wrap_socket(plain, server_hostname="localhost") as secured:
                found.add(secured.getpeercert()["serialNumber"])
                assert secured.recv(1)
        return found

    assert await asyncio.to_thread(serials) == {port.certificates.current.serial}
    assert port.count("done") == 50


@needs_native_edge
async def test_a_server_that_stops_while_its_certificate_is_replaced_frees_its_port(watched, authority, mounted):
    port, watch = await watched(NativeEndpoint, interval_s=3_600)
    number = port.port
    mounted.show(authority.server("second"), authority.file)
    await asyncio.gather(watch.look(), port.endpoint.hang_up(), watch.look())

    def connect():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", number), timeout=30)

    await asyncio.to_thread(connect)
