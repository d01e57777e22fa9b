"""Callers that are known by a client certificate, on both kinds of gRPC port."""

from __future__ import annotations

import grpc.aio
import pytest
from cryptography import x509

from server.config_sections import TlsConfig
from tests.certificates import Authority
from tests.server.access.test_gate import FEED, call, section

NAMED = (
    '[callers.feed]\ncertificates = ["spiffe://prod/feed"]\nmay = ["rank"]\n'
    '[callers.tracker]\ncertificates = ["tracker"]\nmay = ["record"]\n' + section("tokened", FEED, ["seen"])
)


@pytest.mark.parametrize("edge", ["native", "grpcio"])
async def test_a_callers_certificate_says_what_it_may(serve, tmp_path, edge):
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    (tmp_path / "callers.toml").write_text(NAMED)
    server_pair = authority.server()
    tls = TlsConfig(certificate=server_pair.certificate, key=server_pair.key, client_ca=authority.file)
    server = await serve(tls=tls, callers_file=tmp_path / "callers.toml", grpc_edge=edge)
    uri = x509.UniformResourceIdentifier

    async def status(pair, method, token=None):
        credentials = grpc.ssl_channel_credentials(
            authority.file.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
        )
        target = f"localhost:{server.grpc_port}"
        async with grpc.aio.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return (await call(channel, method, token=token))[:2]

    feed = authority.client("feed", [uri("spiffe://prod/feed")], common="tracker")
    tracker = authority.client("tracker", common="tracker")
    nobody = authority.client("nobody", [uri("spiffe://prod/nobody")], common=None)
    foreign = stranger.client("foreign", [uri("spiffe://prod/feed")])
    assert (await status(feed, "RankingService/Rank"))[0] == "OK", "alternative names go before the common one"
    assert (await status(feed, "ActivityService/Record"))[0] == "PERMISSION_DENIED"
    assert (await status(tracker, "ActivityService/Record"))[0] == "FAILED_PRECONDITION", "nothing is recorded here"
    assert (await status(tracker, "RankingService/Rank"))[0] == "PERMISSION_DENIED"
    disguised = authority.client("disguised", [uri("spiffe://prod/other")], common="spiffe://prod/feed")
    assert (await status(disguised, "RankingService/Rank"))[0] == "UNAUTHENTICATED", "its alternative name counts"
    code, text = await status(nobody, "RankingService/Rank")
    assert code == "UNAUTHENTICATED"
    assert "the names in its certificate are spiffe://prod/nobody: send" in text
    assert (await status(foreign, "RankingService/Rank"))[0] == "UNAVAILABLE"
    assert (await status(feed, "ImpressionService/Seen", FEED))[0] == "FAILED_PRECONDITION", "a token goes first"
    assert (await status(feed, "RankingService/Rank", FEED))[0] == "PERMISSION_DENIED"
    assert (await status(feed, "RankingService/Rank", "wrong"))[0] == "UNAUTHENTICATED"
