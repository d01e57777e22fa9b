"""The HTTP/2 machine against h2, another implementation: every call arrives, however its bytes are cut."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.edge.http2 import (
    HEADER_BYTES_MAX,
    ConnectionBrokenError,
    EventKind,
    Http2Connection,
    Http2Endpoint,
)
from tests.server.edge.pair import HEADERS, MANY, MESSAGE_BYTES_MAX, ONE, Pair, message
from tests.server.edges import needs_native_edge

pytestmark = needs_native_edge


@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(1, 50), max_size=200))
def test_calls_arrive_whole_however_their_bytes_are_cut(contents, cuts):
    pair = Pair()
    streams = [pair.call(message(content)) for content in contents]
    pair.exchange(cuts)
    assert [(event.stream, event.message) for event in pair.calls()] == list(zip(streams, contents, strict=True))
    for stream, content in zip(streams, contents, strict=True):
        pair.server.answer(stream, content[::-1])
    pair.exchange()
    for stream, content in zip(streams, contents, strict=True):
        assert pair.data(stream) == message(content[::-1])
        assert pair.trailers(stream)["grpc-status"] == "0"
    closed = [event.stream for event in pair.served if event.kind == EventKind.CLOSED]
    assert sorted(closed) == streams


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 50), max_size=200))
def test_a_stream_of_messages_arrives_in_order_however_it_is_cut(contents, cuts):
    pair = Pair()
    stream = pair.begin(MANY)
    pair.send(stream, b"".join(map(message, contents)))
    pair.exchange(cuts)
    kinds = [EventKind.CALL, *[EventKind.MESSAGE] * len(contents), EventKind.REQUEST_ENDED]
    assert [event.kind for event in pair.served] == kinds
    assert [event.message for event in pair.served[1:-1]] == contents
    for content in contents:
        pair.server.message(stream, content)
    pair.server.end(stream, 0)
    pair.exchange()
    assert pair.data(stream) == b"".join(map(message, contents))
    assert pair.trailers(stream)["grpc-status"] == "0"


@given(st.data())
def test_bytes_that_a_stranger_changed_end_the_connection_at_worst(data):
    pair = Pair()
    for content in (b"a" * 40, b"b"):
        pair.call(message(content), agent="x" * 20)
    sent = bytearray(pair.client.data_to_send())
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    try:
        for event in pair.server.receive(bytes(sent)):
            pair.server.answer(event.stream, event.message)
        while pair.server.send()[0]:
            pass
    except ConnectionBrokenError:
        pass


@pytest.mark.parametrize(
    ("content", "headers", "code", "text"),
    [
        (b"", {}, 12, "none came"),
        (message(b"a") + message(b"b"), {}, 12, "more came"),
        (message(b"abc")[:-1], {}, 13, "the message is cut off"),
        (message(b"abc")[:3], {}, 13, "the message is cut off"),
        (message(b"", size=MESSAGE_BYTES_MAX + 1), {}, 8, "larger than max (100001 vs. 100000)"),
        (message(b"a", compressed=2), {}, 13, "prefix is malformed"),
        (message(b"a"), {"path": "/test/Other"}, 12, "Method not found!"),
        (message(b"a"), {"grpc-timeout": "1y"}, 3, "grpc-timeout is malformed"),
        (message(b"a"), {"grpc-timeout": "123456789S"}, 3, "grpc-timeout is malformed"),
        (message(b"a"), {"x": "y" * HEADER_BYTES_MAX}, 8, "the metadata exceeds 16384 bytes"),
        (message(b"a")[:-1], {"path": MANY}, 13, "the last message is cut off"),
        (message(b"", size=MESSAGE_BYTES_MAX + 1), {"path": MANY}, 8, "larger than max"),
    ],
)
def test_a_request_that_is_none_gets_its_status(content, headers, code, text):
    pair = Pair()
    stream = pair.begin(**headers)
    pair.send(stream, content)
    pair.exchange()
    assert pair.trailers(stream)["grpc-status"] == str(code)
    assert text in pair.trailers(stream)["grpc-message"]
    assert [event for event in pair.calls() if event.message] == []


def test_another_content_type_is_refused_as_http_does():
    pair = Pair()
    stream = pair.call(message(b"a"), **{"content-type": "text/html"})
    pair.exchange()
    answers = [dict(e.headers) for e in pair.answered if isinstance(e, h2.events.ResponseReceived)]
    assert answers == [{":status": "415"}]
    assert pair.calls() == []
    assert stream


@pytest.mark.parametrize(
    ("text", "us"),
    [("2H", 7_200_000_000), ("3M", 180_000_000), ("4S", 4_000_000), ("250m", 250_000), ("7u", 7), ("9000n", 9)],
)
def test_the_timeout_is_read_in_every_unit(text, us):
    pair = Pair()
    pair.call(message(b"a"), **{"grpc-timeout": text})
    pair.call(message(b"a"))
    pair.exchange()
    assert [event.timeout_us for event in pair.calls()] == [us, -1]


def test_a_client_that_goes_on_after_its_answer_is_told_to_stop():
    pair = Pair()
    stream = pair.begin(MANY)
    pair.exchange()
    pair.server.end(stream, 9, "no%20more", [(b"a-bin", b"AAE")])
    pair.exchange()
    trailers = pair.trailers(stream)
    assert (trailers["grpc-status"], trailers["grpc-message"], trailers["a-bin"]) == ("9", "no%20more", "AAE")
    resets = [event for event in pair.answered if isinstance(event, h2.events.StreamReset)]
    assert [(event.stream_id, event.error_code) for event in resets] == [(stream, h2.errors.ErrorCodes.NO_ERROR)]


def test_a_call_that_its_caller_gives_up_is_closed_and_takes_no_answer():
    pair = Pair()
    stream = pair.call(message(b"a"))
    pair.exchange()
    pair.client.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
    pair.exchange()
    assert [event.kind for event in pair.served] == [EventKind.CALL, EventKind.CLOSED]
    pair.server.answer(stream, b"late")
    pair.server.message(stream, b"late")
    pair.server.end(stream, 1)
    pair.server.taken(stream, 1)
    assert pair.server.metadata(stream) == ()
    pair.exchange()
    assert pair.trailers(stream) == {}


def credentials_of(pair, *headers):
    """Make calls with headers; return what the server's side says of each one's credentials, and their numbers."""
    before = len(pair.calls())
    for some in headers:
        stream = pair.client.get_next_available_stream_id()
        pair.client.send_headers(stream, [*(HEADERS | {":path": MANY}).items(), *some])
        pair.exchange()
    found = pair.calls()[before:]
    return [pair.server.credentials(event.stream, event.credentials) for event in found], [e.credentials for e in found]


def test_credentials_are_found_and_nothing_that_reads_like_them():
    token, caller = "authorization", "x-pinrank-caller"
    found, _ = credentials_of(
        Pair(),
        [("x-first", token), (token, "one"), ("x-last", token)],
        [(token, "a"), (token, ""), (token, "b"), (caller, token)],
        [(caller, "c")],
        [("x-authorization", "d"), ("authorizatio", "n")],
    )
    assert found == [([b"one"], []), ([b"a", b"", b"b"], [b"authorization"]), ([], [b"c"]), ([], [])]


def test_calls_with_the_same_credentials_have_the_same_number_and_no_others():
    token, caller = "authorization", "x-pinrank-caller"
    calls = [[(token, "a")], [(token, "b")], [], [(token, "a"), ("x-other", "c")], [(caller, "a")],
             [(token, "a"), (caller, "a")], [(caller, "a"), (token, "a")]]  # fmt: skip
    found, numbers = credentials_of(pair := Pair(), *calls)
    assert numbers == [1, 2, 0, 1, 3, 4, 5]
    assert found[0] is found[3]
    assert credentials_of(pair, calls[1], calls[0]) == ([found[1], found[0]], [2, 1])


@given(st.lists(st.integers(0, 30), max_size=200), st.sampled_from([1, 500, 9_000]))
def test_credentials_are_those_of_the_call_however_many_were_forgotten(tokens, size):
    pair, by_number = Pair(), {}
    for token in tokens:
        value = f"{token}-" + "x" * size
        (found,), (number,) = credentials_of(pair, [("authorization", value)])
        assert found == ([value.encode()], [])
        assert by_number.setdefault(number, found) == found
    assert pair.server.remembered <= (24 << 10) // (400 + size)


def test_credentials_that_are_too_long_are_found_and_not_remembered():
    long = "a" * 30_000
    pair = Pair(Http2Endpoint({ONE: False, MANY: True}, MESSAGE_BYTES_MAX, header_bytes_max=64 << 10))
    found, numbers = credentials_of(pair, [("authorization", long)], [("authorization", "b")])
    assert (found, numbers) == ([([long.encode()], []), ([b"b"], [])], [-1, 1])
    assert pair.server.remembered == 1


def test_a_call_that_is_over_leaves_no_credentials_to_others():
    pair = Pair()
    stream = pair.begin(MANY, authorization="a")
    pair.client.reset_stream(stream)
    pair.exchange()
    (begun,) = pair.calls()
    assert pair.server.credentials(stream, begun.credentials) == ([], [])
    found, numbers = credentials_of(pair, [("authorization", "a")])
    assert (found, numbers) == ([([b"a"], [])], [begun.credentials])


def test_an_answer_larger_than_the_windows_arrives_whole():
    pair = Pair()
    stream = pair.call(message(b"a"))
    pair.exchange()
    pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1_000})
    pair.exchange()
    content = bytes(range(256)) * 200
    pair.server.answer(stream, content)
    pair.exchange()
    while len(pair.data(stream)) < len(message(content)):
        before = len(pair.data(stream))
        pair.client.increment_flow_control_window(700, stream)
        pair.exchange()
        assert len(pair.data(stream)) > before
    pair.exchange()
    assert pair.data(stream) == message(content)
    assert pair.trailers(stream)["grpc-status"] == "0"


def test_metadata_is_what_the_client_sent():
    pair = Pair()
    stream = pair.call(message(b"a"), user="7", **{"token-bin": "AAE"})
    pair.exchange()
    sent = {"te": "trailers", "content-type": "application/grpc", "user": "7", "token-bin": "AAE"}
    assert dict(pair.server.metadata(stream)) == sent


def test_a_retiring_connection_takes_the_calls_on_their_way_and_no_others():
    pair = Pair()
    pair.server.retire()
    first = pair.call(message(b"sent before it was heard"))
    pair.exchange()
    assert [event.stream for event in pair.calls()] == [first]
    assert pair.server.is_open
    pair.server.go_away()
    content, _ = pair.server.send()
    gone = [e for e in pair.client.receive_data(content) if isinstance(e, h2.events.ConnectionTerminated)]
    assert [event.last_stream_id for event in gone] == [first]
    pair.server.answer(first, b"done")
    content, _ = pair.server.send()
    assert message(b"done") in content
    assert not pair.server.is_open


def test_what_is_not_http2_breaks_the_connection():
    connection = Http2Connection(Http2Endpoint({ONE: False}, 10))
    with pytest.raises(ConnectionBrokenError):
        connection.receive(b"GET / HTTP/1.1\r\n\r\n" * 5)
    assert not connection.is_greeted
    assert Pair().server.is_greeted
