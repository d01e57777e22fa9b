"""The HTTP port on real sockets: what clients can do to it, and what they cannot."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import pytest

from server.web.messages import HEAD_BYTES_MAX, text
from tests.feature_client.redis.test_redis_faults import certificate
from tests.server.web.exchange import exchange, fetch, idle_connections, many_descriptors, received


async def alive(_):
    return text(HTTPStatus.OK, "alive")


@pytest.mark.parametrize(
    ("sent", "first", "last"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK", b"alive\n"),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK", b""),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.1 405 Method Not Allowed", b"GET, HEAD\n"),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 Bad Request", b"HTTP/1.1\n"),
        (b"GET / HTTP/3\r\n\r\n", b"HTTP/1.1 505 HTTP Version Not Supported", b"HTTP/1.1\n"),
        (
            b"GET / HTTP/1.1\r\nA: " + b"a" * (1 << 20) + b"\r\n\r\n",
            b"HTTP/1.1 431 Request Header Fields Too Large",
            b"more than 8192 bytes\n",
        ),
    ],
    ids=["GET", "HEAD", "POST", "nonsense", "HTTP/3", "a megabyte of header"],
)
def test_every_client_gets_a_clear_answer(open_port, sent, first, last):
    answer = exchange(open_port(alive), sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(first)
    assert body.endswith(last)


def test_a_client_that_has_said_everything_may_close_its_side(open_port):
    asked, answer = threading.Event(), threading.Event()

    async def slow(_):
        asked.set()
        await asyncio.to_thread(answer.wait, 30)
        return text(HTTPStatus.OK, "alive")

    with socket.create_connection(("127.0.0.1", open_port(slow)), timeout=30) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert asked.wait(30)
        opened.shutdown(socket.SHUT_WR)
        answer.set()
        assert received(opened).endswith(b"alive\n")


def test_a_page_that_fails_is_a_500_and_logged_and_the_port_goes_on(open_port, capfd):
    fail = [True]

    async def page(_):
        if fail.pop():
            raise KeyError("a bug")
        return text(HTTPStatus.OK, "alive")

    port = open_port(page)
    status, body, _ = fetch(port, "/")
    assert (status, body) == (500, b"this page could not be made; the log says why\n")
    assert "http_failed" in capfd.readouterr().out
    fail.append(False)
    assert fetch(port, "/")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nA: b\r\n"], ids=["nothing", "a byte", "half a head"])
def test_a_flood_of_connections_that_say_too_little_keeps_nobody_out(open_port, sent):
    port = open_port(alive, request_s_max=60)
    with many_descriptors(), idle_connections(port, 500, sent), ThreadPoolExecutor(8) as checks:
        answers = list(checks.map(lambda _: fetch(port, "/")[0], range(100)))
        assert answers == [200] * 100


def test_health_checks_are_answered_while_connections_arrive(open_port):
    port = open_port(alive, request_s_max=60)
    ended = threading.Event()

    def flood():
        while not ended.is_set():
            with idle_connections(port, 100):
                pass

    with many_descriptors(), ThreadPoolExecutor(2) as flooding:
        floods = [flooding.submit(flood) for _ in range(2)]
        try:
            assert [fetch(port, "/")[0] for _ in range(100)] == [200] * 100
        finally:
            ended.set()
        for one in floods:
            one.result()


def test_the_oldest_idle_connection_makes_room_and_one_that_is_answered_does_not(open_port):
    asked, answer = threading.Semaphore(0), threading.Event()

    async def slow(request):
        if request.path == "/slow":
            asked.release()
            await asyncio.to_thread(answer.wait, 30)
        return text(HTTPStatus.OK, "alive")

    port = open_port(slow, connections_max=4, request_s_max=60)
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(fetch, port, "/slow")
        assert asked.acquire(timeout=30)
        with idle_connections(port, 3) as idle:
            assert fetch(port, "/")[0] == 200
            assert received(idle[0]) == b""
            rest = [clients.submit(fetch, port, "/slow") for _ in range(3)]
            assert all(asked.acquire(timeout=30) for _ in range(3))
            # Four are being answered: the fifth waits in the backlog, and none of the four is closed for it.
            with socket.create_connection(("127.0.0.1", port), timeout=30) as fifth:
                fifth.sendall(b"GET / HTTP/1.1\r\n\r\n")
                answer.set()
                assert received(fifth).endswith(b"alive\n")
        assert [one.result()[0] for one in [first, *rest]] == [200] * 4


def test_connections_that_are_closed_before_they_are_accepted_take_no_place(open_port):
    asked, go_on = threading.Event(), threading.Event()

    async def page(request):
        if request.path == "/hold":
            asked.set()
            go_on.wait(30)  # holds the port's loop, so that nothing is accepted
        return text(HTTPStatus.OK, "alive")

    port = open_port(page, connections_max=4, request_s_max=60)
    with idle_connections(port, 3) as idle, ThreadPoolExecutor(1) as clients:
        held = clients.submit(fetch, port, "/hold")
        assert asked.wait(30)
        with idle_connections(port, 100):
            pass
        go_on.set()
        assert held.result()[0] == 200
        assert fetch(port, "/")[0] == 200
        idle[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert received(idle[0]).endswith(b"alive\n")


def cut_off(opened, piece):
    """Send pieces until the server has closed the connection."""
    ends_s = time.monotonic() + 30
    try:
        while time.monotonic() < ends_s:
            opened.sendall(piece)
            time.sleep(0.02)  # the pace of a client that is slow on purpose
    except ConnectionError:
        return True
    return False


def test_a_client_that_sends_a_byte_now_and_then_is_cut_off_in_time(open_port):
    port = open_port(alive, request_s_max=0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\nA: ")
        assert cut_off(opened, b"a")
    assert fetch(port, "/")[0] == 200


def test_a_client_that_does_not_read_is_cut_off_in_time(open_port):
    large = "a" * (32 << 20)

    async def page(_):
        return text(HTTPStatus.OK, large)

    with socket.create_connection(("127.0.0.1", open_port(page, request_s_max=0.3)), timeout=30) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert cut_off(opened, b"a")
        assert len(received(opened)) < len(large)


def test_a_request_of_many_small_pieces_is_read(open_port):
    with socket.create_connection(("127.0.0.1", open_port(alive)), timeout=30) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET / HTTP/1.1\r\nA: " + b"a" * 500 + b"\r\n\r\n":
            opened.sendall(bytes([byte]))
        assert received(opened).endswith(b"alive\n")
    assert HEAD_BYTES_MAX > 500


@pytest.fixture
def contexts(tmp_path):
    """A server's context with a certificate for 127.0.0.1, and a client's that trusts it."""
    certificate_file, key_file = certificate(tmp_path)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(certificate_file, key_file)
    return ours, ssl.create_default_context(cafile=certificate_file)


def test_with_a_certificate_the_port_speaks_tls_and_asks_for_it_each_time(open_port, contexts):
    ours, theirs = contexts
    given = []

    def current():
        given.append(ours)
        return ours

    port = open_port(alive, tls=current)
    for count in (1, 2):
        client = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=theirs)
        client.request("GET", "/")
        assert client.getresponse().read() == b"alive\n"
        client.close()
        assert len(given) == count
    assert exchange(port, b"GET / HTTP/1.1\r\n\r\n") == b""


def test_a_handshake_that_does_not_end_is_cut_off_and_keeps_nobody_out(open_port, contexts):
    ours, theirs = contexts
    port = open_port(alive, tls=lambda: ours, request_s_max=60)
    with many_descriptors(), idle_connections(port, 200, b"\x16\x03\x01\x02\x00\x01"):
        client = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=theirs)
        client.request("GET", "/")
        assert client.getresponse().read() == b"alive\n"
        client.close()
    port = open_port(alive, tls=lambda: ours, request_s_max=0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
        opened.sendall(b"\x16\x03\x01")
        assert received(opened) == b""


def test_a_certificate_that_cannot_be_used_ends_a_connection_and_not_the_port(open_port, contexts):
    ours, theirs = contexts
    broken = [True]
    port = open_port(alive, tls=lambda: 1 / 0 if broken else ours)
    assert exchange(port, b"\x16") == b""
    broken.clear()
    client = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=theirs)
    client.request("GET", "/")
    assert client.getresponse().status == 200
    client.close()
