"""TLS on both edges: who may connect, who a caller is, and that no answer is lost."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import socket
import ssl
import warnings
from collections import Counter

import grpc
import grpc.aio
import pytest
from cryptography import x509

from server.edge import grpcio_endpoint, handshakes
from server.edge.native_endpoint import NativeEndpoint
from server.runtime.tls import TlsFiles
from tests.certificates import Authority
from tests.conftest import eventually
from tests.server.edge.secured import SecuredPort, client_context, hello, shaken
from tests.server.edges import EDGES, needs_native_edge

# The server runs on uvloop, whose TLS is not asyncio's.
EVENT_LOOPS = ("asyncio", "uvloop")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
async def secured(authority):
    """Start edges with TLS; stop them at the end."""
    started = []

    async def start(kind, clients="off", minimum="1.2", **options):
        pair = authority.server()
        files = TlsFiles(pair.certificate, pair.key, authority.file, clients, minimum)
        started.append(await SecuredPort(kind, files, **options).start())
        return started[-1]

    yield start
    for one in started:
        await one.endpoint.stop()


async def refusal(channel):
    """Make a call that must not be answered; return why not."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary("/test/Reverse")(b"ab", timeout=20)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    return raised.value.details()


@pytest.mark.parametrize("kind", EDGES)
async def test_calls_are_answered_over_tls_and_a_client_without_it_is_refused(secured, authority, kind):
    port = await secured(kind)
    async with port.channel(authority.file) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
        await refusal(channel)
    if kind is NativeEndpoint:
        await eventually(lambda: port.count("failed") == 1)
        assert (port.count("begun"), port.count("done")) == (2, 1)


@pytest.mark.parametrize("kind", EDGES)
async def test_a_client_checks_the_name_of_the_server(secured, authority, tmp_path, kind):
    port = await secured(kind)
    override = {"grpc.ssl_target_name_override": "ranker.example"}
    for host in ("127.0.0.1", "localhost"):
        async with port.channel(authority.file, host=host) as channel:
            assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
    async with port.channel(authority.file, **override) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
    async with port.channel(authority.file, **{"grpc.ssl_target_name_override": "other.example"}) as channel:
        assert "Hostname Verification Check failed" in await refusal(channel)
    async with port.channel(Authority(tmp_path / "foreign", "foreign").file) as channel:
        assert "CERTIFICATE_VERIFY_FAILED" in await refusal(channel)


@pytest.mark.parametrize("kind", EDGES)
async def test_older_versions_of_tls_are_refused(secured, authority, kind):
    port = await secured(kind)
    found = {}
    for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = client_context(authority, weak=True)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version = context.maximum_version = version
        found[version.name] = await shaken(port.port, context)
    assert found.pop("TLSv1_1").startswith("refused")
    assert found == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}


@needs_native_edge
async def test_the_lowest_version_can_be_raised(secured, authority):
    port = await secured(NativeEndpoint, minimum="1.3")
    context = client_context(authority)
    assert await shaken(port.port, context) == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert (await shaken(port.port, context)).startswith("refused")


@pytest.mark.parametrize("kind", EDGES)
@pytest.mark.parametrize("alpn", [None, "http/1.1"])
async def test_a_client_that_does_not_offer_http2_is_closed(secured, authority, kind, alpn):
    port = await secured(kind)
    assert await shaken(port.port, client_context(authority, alpn)) != "TLSv1.3"
    if kind is NativeEndpoint:
        await eventually(lambda: port.count("no_h2") == 1)
        assert not port.endpoint.connections


@pytest.mark.parametrize("kind", EDGES)
async def test_only_clients_with_a_valid_certificate_of_the_authority_are_answered(secured, authority, tmp_path, kind):
    port = await secured(kind, "require")
    foreign = Authority(tmp_path / "foreign", "foreign")
    for pair in (None, foreign.client(), authority.client("expired", valid=-dt.timedelta(days=1))):
        async with port.channel(authority.file, pair) as channel:
            await refusal(channel)
    # One for servers is none for clients.
    async with port.channel(authority.file, authority.server("peer")) as channel:
        await refusal(channel)
    async with port.channel(authority.file, authority.client()) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
    if kind is NativeEndpoint:
        await eventually(lambda: port.count("failed") >= 4)


@pytest.mark.parametrize("kind", EDGES)
async def test_the_authority_of_clients_may_be_one_below_another(authority, tmp_path, kind):
    below, pair = Authority(tmp_path / "below", "below", authority), authority.server()
    port = await SecuredPort(kind, TlsFiles(pair.certificate, pair.key, below.file, "require")).start()
    async with port.channel(authority.file, below.client()) as channel:
        assert await channel.unary_unary("/test/WhoAmI")(b"", timeout=20) == b"frontend|"
    async with port.channel(authority.file, authority.client()) as channel:
        await refusal(channel)
    await port.endpoint.stop()


@needs_native_edge
async def test_the_reason_of_a_failed_handshake_is_logged(secured, authority, tmp_path, capfd):
    port = await secured(NativeEndpoint, "require")
    async with port.channel(authority.file, authority.client("expired", valid=-dt.timedelta(days=1))) as channel:
        await refusal(channel)
    async with port.channel(authority.file, Authority(tmp_path / "foreign", "foreign").client()) as channel:
        await refusal(channel)
    said = capfd.readouterr().out
    assert "CERTIFICATE_VERIFY_FAILED: certificate has expired" in said
    assert "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate" in said


NAMES = (
    x509.DNSName("frontend.example"),
    x509.UniformResourceIdentifier("spiffe://example/ns/web/sa/frontend"),
    x509.RFC822Name("owner@example.org"),
    x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
    x509.IPAddress(ipaddress.ip_address("fd00::1:2")),
    x509.IPAddress(ipaddress.ip_address("::ffff:1.2.3.4")),
)
SHOWN = b"frontend.example,spiffe://example/ns/web/sa/frontend,owner@example.org,10.1.2.3,fd00::1:2,::ffff:1.2.3.4"


@pytest.mark.parametrize("kind", EDGES)
async def test_a_handler_knows_its_caller_by_the_names_in_the_certificate(secured, authority, kind):
    port = await secured(kind, "require")
    said = []
    for pair in (
        authority.client(names=NAMES),
        authority.client("nameless", names=NAMES[:1], common=None),
        authority.client("plain", common="früh"),
    ):
        async with port.channel(authority.file, pair) as channel:
            said.append(await channel.unary_unary("/test/WhoAmI")(b"", timeout=20))
    assert said == [b"frontend|" + SHOWN, b"|frontend.example", "früh|".encode()]


@pytest.mark.parametrize("kind", EDGES)
async def test_a_caller_that_was_not_asked_has_no_names(secured, authority, kind):
    port = await secured(kind)
    async with port.channel(authority.file, authority.client()) as channel:
        assert await channel.unary_unary("/test/WhoAmI")(b"", timeout=20) == b"|"


@needs_native_edge
async def test_a_client_that_may_show_a_certificate_is_known_by_it_if_it_does(secured, authority, tmp_path):
    port = await secured(NativeEndpoint, "ask")
    for pair, name in ((None, b"|"), (authority.client(), b"frontend|")):
        async with port.channel(authority.file, pair) as channel:
            assert await channel.unary_unary("/test/WhoAmI")(b"", timeout=20) == name
    async with port.channel(authority.file, Authority(tmp_path / "foreign", "foreign").client()) as channel:
        await refusal(channel)


@needs_native_edge
async def test_a_client_whose_names_cannot_be_read_is_refused_and_leaves_nothing_behind(secured, authority, capfd):
    port = await secured(NativeEndpoint, "require")
    odd = authority.client("odd", raw_names=bytes.fromhex("3005 8203 61e962"))  # a DNS name that is not UTF-8
    async with port.channel(authority.file, odd) as channel:
        await refusal(channel)
    await eventually(lambda: port.count("failed") >= 1)
    assert "the client's certificate cannot be read" in capfd.readouterr().out
    await eventually(lambda: port.metrics.value("pinrank_connections") == 0)


@needs_native_edge
async def test_unfinished_handshakes_count_as_connections_and_the_oldest_makes_room(secured, authority, monkeypatch):
    monkeypatch.setattr(handshakes, "HANDSHAKE_S_MAX", 60.0)
    port = await secured(NativeEndpoint, connections_max=20)
    stalled = [socket.create_connection(("127.0.0.1", port.port), timeout=60) for _ in range(20)]
    await eventually(lambda: port.metrics.value("pinrank_connections") == 20)
    assert not port.endpoint.connections
    async with port.channel(authority.file) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
        assert await asyncio.to_thread(received_until_closed, stalled[0]) == b""
        assert port.metrics.value("pinrank_connections_closed_total", reason="crowded") == 1
        assert port.metrics.value("pinrank_connections") == 20
        stalled[1].close()
        await eventually(lambda: port.metrics.value("pinrank_connections") == 19)
    for one in stalled[2:]:
        one.sendall(hello()[:10])
    await port.endpoint.stop()
    for one in stalled[2:]:
        assert await asyncio.to_thread(received_until_closed, one) == b""
    assert port.metrics.value("pinrank_connections") == 0


@pytest.mark.parametrize("kind", EDGES)
async def test_clients_that_do_not_finish_their_handshake_are_closed_and_hold_up_nobody(
    secured, authority, kind, monkeypatch
):
    for module in (handshakes, grpcio_endpoint):
        monkeypatch.setattr(module, "HANDSHAKE_S_MAX", 0.5)
    port = await secured(kind)
    begun = hello()
    slow = [socket.create_connection(("127.0.0.1", port.port), timeout=60) for _ in range(30)]
    for one in slow[:20]:
        one.sendall(begun[: len(begun) // 2])
    async with port.channel(authority.file) as channel:
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"
        for one in slow:
            assert await asyncio.to_thread(received_until_closed, one) == b""
        assert await channel.unary_unary("/test/Reverse")(b"ab", timeout=20) == b"ba"


def received_until_closed(own):
    with own:
        try:
            return own.recv(1)
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("kind", EDGES)
async def test_every_answer_arrives_while_the_server_stops(secured, authority, kind):
    port = await secured(kind)
    ended: Counter[str] = Counter()

    async def caller(reverse):
        while not ended["UNAVAILABLE"]:
            try:
                assert await reverse(b"ab" * 5_000, timeout=20) == b"ba" * 5_000
                ended["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ended[error.code().name] += 1

    channels = [port.channel(authority.file) for _ in range(4)]
    reverses = [channels[i % 4].unary_unary("/test/Reverse") for i in range(64)]
    calling = asyncio.gather(*map(caller, reverses))
    await eventually(lambda: ended["OK"] > 300)
    await port.endpoint.hang_up()
    await calling
    assert set(ended) == {"OK", "UNAVAILABLE"}
    for channel in channels:
        await channel.close()
    if kind is NativeEndpoint:  # grpcio's cuts off calls that have run
        assert ended["OK"] == len(port.service.contexts)


@pytest.mark.parametrize("kind", EDGES)
async def test_calls_that_hang_end_with_unavailable_when_the_server_stops(secured, authority, kind):
    port = await secured(kind)
    async with port.channel(authority.file) as channel:
        stuck = asyncio.ensure_future(channel.unary_unary("/test/Hang")(b"", timeout=30))
        await eventually(lambda: port.service.running == 1)
        await port.endpoint.hang_up()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stuck
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    if kind is NativeEndpoint:
        assert "the server is shutting down" in raised.value.details()


@pytest.mark.parametrize("kind", EDGES)
async def test_large_answers_arrive_side_by_side(secured, authority, kind):
    port = await secured(kind)
    async with port.channel(authority.file) as channel:
        many = channel.unary_unary("/test/Many")
        answers = await asyncio.gather(*(many(b"", timeout=60) for _ in range(8)))
    assert [len(answer) for answer in answers] == [4 << 20] * 8


@needs_native_edge
async def test_a_client_that_does_not_read_its_answers_is_not_read_either(secured, authority):
    import h2.connection
    import h2.settings

    from tests.server.edge.service import begin

    port = await secured(NativeEndpoint)
    client = h2.connection.H2Connection()
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    client.increment_flow_control_window(2**31 - 1 - 65_535)

    def connect():
        plain = socket.create_connection(("127.0.0.1", port.port), timeout=60)
        return client_context(authority).wrap_socket(plain, server_hostname="localhost")

    own = await asyncio.to_thread(connect)
    for _ in range(8):
        begin(client, "/test/Many", b"")
    await asyncio.to_thread(own.sendall, client.data_to_send())
    (connection,) = port.endpoint.connections
    await eventually(lambda: not connection.is_reading)

    def read():
        ended = got = 0
        while ended < 8:
            for event in client.receive_data(own.recv(1 << 20)):
                got += len(getattr(event, "data", None) or b"")
                ended += isinstance(event, h2.events.StreamEnded)
        return got

    assert await asyncio.to_thread(read) >= 8 * (4 << 20)
    await eventually(lambda: connection.is_reading)
    own.close()
    await eventually(lambda: not port.endpoint.connections)


@needs_native_edge
async def test_no_call_fails_when_its_connection_comes_of_age(secured, authority, monkeypatch):
    monkeypatch.setattr("server.edge.connection.RETIREMENT_S", 0.05)
    port = await secured(NativeEndpoint, age_s_max=0.1)
    async with port.channel(authority.file) as channel:
        reverse = channel.unary_unary("/test/Reverse")
        while len({peer for _, peer, _ in port.service.contexts}) < 4:
            assert await asyncio.gather(*(reverse(b"ab") for _ in range(20))) == [b"ba"] * 20
        await eventually(lambda: len(port.endpoint.connections) <= 1)
