"""A proxy that speaks for others: whose call a call is, by calls to a real server on both kinds of gRPC port."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from cryptography import x509

from pinrank.v1 import models_pb2
from server.config_sections import TlsConfig
from tests.certificates import Authority
from tests.server.access.test_gate import FEED, MESSAGES, NAMED, OPERATOR, WRITER, counted, section

PROXY = "of-the-proxy"
URI, PROXY_URI = "spiffe://prod/feed", "spiffe://prod/proxy"
WITH_PROXY = NAMED.replace("[callers.feed]\n", f'[callers.feed]\ncertificates = ["{URI}"]\n') + section(
    "proxy", PROXY, [], f'certificates = ["{PROXY_URI}"]\nspeaks_for_others = true'
)


async def call(channel, method, token=None, names=(), message=None):
    """Return the status of a call with its text."""
    metadata = [("x-pinrank-caller", name) for name in names]
    if token is not None:
        metadata.append(("authorization", f"Bearer {token}"))
    made = channel.unary_unary(f"/pinrank.v1.{method}")
    sent = made((message or MESSAGES[method]).SerializeToString(), timeout=20, metadata=tuple(metadata))
    return (await sent.code()).name, await sent.details() or ""


@pytest.fixture(params=["native", "grpcio"])
async def start(request, serve, tmp_path):
    """Start a server that knows a proxy, and return it and a function that calls it."""
    channels = []

    async def start(callers=WITH_PROXY, credentials=None, **changes):
        (tmp_path / "callers.toml").write_text(callers)
        server = await serve(callers_file=tmp_path / "callers.toml", grpc_edge=request.param, **changes)
        address = f"localhost:{server.grpc_port}"
        opened = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
        channels.append(opened)
        return server, lambda method, *given, **more: call(opened, method, *given, **more)

    yield start
    for channel in channels:
        await channel.close()


@pytest.mark.parametrize("name", ["feed", URI], ids=["name of a caller", "name in its certificate"])
async def test_a_proxy_says_whose_call_it_passes_on(start, name):
    server, call = await start()
    assert (await call("RankingService/Rank", PROXY, [name]))[0] == "OK"
    code, text = await call("ActivityService/Record", PROXY, [name])
    assert (code, "caller 'feed' may not record" in text) == ("PERMISSION_DENIED", True)
    assert (counted(server, "feed", "admitted"), counted(server, "proxy", "admitted")) == (1, 0)


async def test_without_the_header_a_proxy_is_itself(start):
    server, call = await start()
    code, text = await call("RankingService/Rank", PROXY)
    assert (code, "caller 'proxy' may not rank" in text) == ("PERMISSION_DENIED", True)
    assert counted(server, "proxy", "denied") == 1


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["nobody"], "'nobody', which 'proxy' sends, is neither the name of a caller"),
        ([""], "'', which 'proxy' sends, is neither"),
        (["anonymous"], "is neither"),
        (["admin"], "is neither"),
        (["feed,operator"], "is neither"),
        (["x" * 2_000], "x', which 'proxy' sends"),
        (["operator", "feed"], "is there 2 times; the proxy 'proxy' must replace what clients send"),
        (["feed", "feed"], "is there 2 times"),
    ],
    ids=["unknown", "empty", "anonymous", "admin", "two in one", "long", "two", "the same twice"],
)
async def test_names_that_say_nothing_clear_are_no_identity(start, names, problem):
    server, call = await start('[anonymous]\nmay = ["rank"]\n' + WITH_PROXY)
    code, text = await call("RankingService/Rank", PROXY, names)
    assert (code, problem in text) == ("UNAUTHENTICATED", True), text
    assert len(text) < 1_000
    assert counted(server, "unknown", "unauthenticated") == 1


@pytest.mark.parametrize("token", [FEED, WRITER, OPERATOR, None], ids=["feed", "writer", "operator", "anonymous"])
async def test_who_may_not_speak_for_others_is_refused_and_told_so(start, token):
    server, call = await start('[anonymous]\nmay = ["rank"]\n' + WITH_PROXY)
    name = {FEED: "feed", WRITER: "writer", OPERATOR: "operator", None: "anonymous"}[token]
    for named in ("feed", "nobody", name):
        code, text = await call("RankingService/Rank", token, [named])
        assert code == "PERMISSION_DENIED"
        assert f"caller {name!r} may not speak for others" in text
        assert "set `speaks_for_others = true`" in text
    assert counted(server, name, "denied") == 3


async def test_a_callers_quota_is_one_whichever_way_it_calls(start):
    _, call = await start(
        WITH_PROXY.replace('may = ["rank", "seen"]', 'may = ["rank"]\nrequests_per_s = 0.001\nburst_s = 3000')
    )
    found = [await call("RankingService/Rank", PROXY, [name]) for name in ("feed", URI)]
    found.append(await call("RankingService/Rank", FEED))
    found.append(await call("RankingService/Rank", PROXY, ["feed"]))
    assert [code for code, _ in found] == ["OK", "OK", "OK", "RESOURCE_EXHAUSTED"]
    assert "caller 'feed' has used its quota" in found[-1][1]


async def test_the_log_of_what_operators_do_names_the_caller_and_the_proxy(start, capsys):
    _, call = await start()
    move = models_pb2.SetLabelRequest(label="canary", version=1, why="a")
    assert (await call("ModelService/SetLabel", PROXY, ["operator"], move))[0] == "OK"
    assert (await call("ModelService/SetLabel", OPERATOR, message=move))[0] == "OK"
    out = capsys.readouterr()
    through, direct = [line for line in (out.out + out.err).splitlines() if "model_call" in line]
    assert "operator via proxy" in through
    assert "via" not in direct


async def test_a_certificate_says_that_a_connection_is_a_proxys_and_a_token_whose_call_it_is(start, tmp_path):
    authority = Authority(tmp_path / "authority")
    pair, own = authority.server(), authority.client("proxy", [x509.UniformResourceIdentifier(PROXY_URI)])
    credentials = grpc.ssl_channel_credentials(*(p.read_bytes() for p in (authority.file, own.key, own.certificate)))
    tls = TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=authority.file)
    server, call = await start(credentials=credentials, tls=tls)
    assert (await call("RankingService/Rank", names=[URI]))[0] == "OK"
    assert (await call("RankingService/Rank"))[0] == "PERMISSION_DENIED", "the proxy itself"
    # As without a proxy, a client's token goes before the names in its certificate.
    assert (await call("ModelService/Status", OPERATOR, [URI]))[0] == "OK"
    assert (await call("RankingService/Rank", "wrong", [URI]))[0] == "UNAUTHENTICATED"
    assert (counted(server, "feed", "admitted"), counted(server, "operator", "admitted")) == (1, 1)


async def test_a_server_that_knows_no_callers_heeds_no_names(serve):
    server = await serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        assert (await call(channel, "RankingService/Rank", names=["feed"]))[0] == "OK"
