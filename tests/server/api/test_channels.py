"""How our own clients reach a server: addresses, proxies, and calls that are made again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest

from pinrank.channels import SERVICE_CONFIG, Address, AddressError, open_aio_channel, parse_address
from pinrank.v1 import ranking_pb2
from server.cli.rank_call import RankCallError, call_rank

REQUEST = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("127.0.0.1:50051", True),
        ("127.1.2.3:1", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("[::]:50051", True),
        ("0.0.0.0:50051", True),
        ("unix:/run/pinrank.sock", True),
        ("10.0.0.1:50051", False),
        ("[fd00::1]:50051", False),
        ("ranker.example:65535", False),
    ],
)
def test_addresses(text, here):
    assert parse_address(text) == Address(text, here=here)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "localhost", "127.0.0.1", ":50051", "localhost:", "localhost:0", "localhost:65536", "localhost:http",
        "localhost:-1", "localhost:\u0663", "http://localhost:50051", "a b:1", "[127.0.0.1:1", "[ranker]:1",
        "unix:relative", "user@host:1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_the_form_of_one(text):
    with pytest.raises(AddressError, match="write "):
        parse_address(text)


def test_an_ipv6_address_without_brackets_is_told_where_they_go():
    with pytest.raises(AddressError, match=r"in brackets: \[::1\]:50051"):
        parse_address("::1:50051")


@pytest.mark.parametrize("proxy", ["grpc_proxy", "https_proxy", "http_proxy"])
async def test_a_server_on_this_machine_is_called_without_the_proxy(server, monkeypatch, proxy):
    monkeypatch.setenv(proxy, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy")
    address = f"127.0.0.1:{server.grpc_port}"
    async with grpc.aio.insecure_channel(address) as through:
        with pytest.raises(grpc.aio.AioRpcError):  # what gRPC does by itself
            await through.unary_unary("/pinrank.v1.RankingService/Rank")(REQUEST.SerializeToString(), timeout=10)
    answer = await asyncio.to_thread(call_rank, address, REQUEST, 10)
    assert sorted(answer.pin_ids) == [1, 2, 3]


def test_the_error_of_a_call_that_went_to_a_proxy_says_so_and_keeps_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(RankCallError, match="at 192.0.2.1:50051 through the proxy of http_proxy") as raised:
        call_rank("192.0.2.1:50051", REQUEST, 10)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("retry", "calls"), [(False, 1), (True, 3)])
async def test_a_call_whose_server_is_gone_is_made_again_when_asked_for(retry, calls):
    taken = []

    async def rank(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        taken.append(1)
        if len(taken) < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(rank)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("pinrank.v1.RankingService", {"Rank": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_aio_channel(f"127.0.0.1:{port}", retry=retry) as channel:
        call = channel.unary_unary("/pinrank.v1.RankingService/Rank")(b"", timeout=20)
        assert await call.code() == (grpc.StatusCode.OK if retry else grpc.StatusCode.UNAVAILABLE)
    await server.stop(None)
    assert len(taken) == calls


def test_operations_page_shows_frontends_the_service_config():
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    shown = page.partition("```json\n")[2].partition("```")[0]
    assert json.loads(shown) == SERVICE_CONFIG
