from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.web.messages import HEAD_BYTES_MAX, Incomplete, Request, Response, read_request, text


@pytest.mark.parametrize(
    ("head", "request_read"),
    [
        ("GET /metrics HTTP/1.1\r\nHost: a\r\n", Request("GET", "/metrics")),
        ("HEAD /livez HTTP/1.0\r\n", Request("HEAD", "/livez")),
        ("GET /metrics?name[]=up HTTP/1.1\r\n", Request("GET", "/metrics")),
        ("GET / HTTP/1.1\r\nAccept-Encoding: gzip\r\n", Request("GET", "/", gzip=True)),
        ("GET / HTTP/1.1\r\naccept-encoding: deflate, gzip;q=0.8, br\r\n", Request("GET", "/", gzip=True)),
        ("GET / HTTP/1.1\r\nAccept-Encoding: gzip;q=0\r\n", Request("GET", "/")),
        ("GET / HTTP/1.1\r\nAccept-Encoding: gzip;q=0.0, br\r\n", Request("GET", "/")),
        ("GET / HTTP/1.1\r\nAccept-Encoding: identity\r\n", Request("GET", "/")),
        ("GET / HTTP/1.1\r\nX-Not: gzip\r\n", Request("GET", "/")),
    ],
)
def test_a_request_is_its_method_its_path_and_whether_it_takes_gzip(head, request_read):
    assert read_request(f"{head}\r\n".encode()) == request_read
    assert read_request(f"{head}\r\nbody".encode()) == request_read


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        ("POST /metrics HTTP/1.1\r\n\r\n", 405, "GET, HEAD"),
        ("DELETE / HTTP/1.1\r\n\r\n", 405, "GET, HEAD"),
        ("GET /\r\n\r\n", 400, "METHOD /path"),
        ("GET / a HTTP/1.1\r\n\r\n", 400, "METHOD /path"),
        ("\x16\x03\x01\x02", 400, "not an HTTP request"),
        ("\r\n\r\n", 400, "not an HTTP request"),
        ("GET http://a/ HTTP/1.1\r\n\r\n", 400, "begin with /"),
        ("GET / HTTP/1.1\r\nno field\r\n\r\n", 400, "header line"),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "header line"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
        ("GET /" + "a" * HEAD_BYTES_MAX, 431, "8192 bytes"),
        ("GET / HTTP/1.1\r\n" + "A: b\r\n" * 2_000 + "\r\n", 431, "8192 bytes"),
    ],
)
def test_what_the_port_does_not_take_is_refused_with_the_reason(sent, status, says):
    refused = read_request(sent.encode("latin-1"))
    assert isinstance(refused, Response)
    assert refused.status == status
    assert says in refused.body.decode()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused_or_incomplete(received):
    found = read_request(received)
    assert isinstance(found, Request | Response | Incomplete)
    assert isinstance(read_request(b"GET / HTTP/1.1\r\nA: " + received + b"\r\n\r\n"), Request | Response)


@pytest.mark.parametrize("cut", range(len(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")))
def test_a_request_that_has_not_arrived_is_waited_for(cut):
    assert read_request(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"[:cut]) == Incomplete()


def test_a_response_to_head_has_the_length_of_its_body_and_no_body():
    response = text(HTTPStatus.NOT_FOUND, "one", "two", fields=(("Allow", "GET"),))
    head, _, body = response.encoded(with_body=True).partition(b"\r\n\r\n")
    assert body == b"one\ntwo\n"
    assert head.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert {b"Content-Length: 8", b"Connection: close", b"Allow: GET"} <= set(head.split(b"\r\n"))
    assert response.encoded(with_body=False) == head + b"\r\n\r\n"
