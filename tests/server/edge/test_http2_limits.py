"""What a connection's machine counts and bounds: calls without answers, kept bytes, metadata, windows."""

from __future__ import annotations

import struct

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

from server.edge.http2 import (
    HEADER_BYTES_MAX,
    EventKind,
    Http2Endpoint,
)
from tests.server.edge.pair import MANY, MESSAGE_BYTES_MAX, ONE, Pair, message
from tests.server.edges import needs_native_edge

pytestmark = needs_native_edge


def test_calls_that_end_without_an_answer_are_counted_whoever_ended_them():
    pair = Pair()
    streams = [pair.call(message(b"a")) for _ in range(3)]
    pair.exchange()
    pair.server.answer(streams[0], b"done")
    pair.exchange()
    assert pair.server.resets == 0
    pair.client.reset_stream(streams[1], h2.errors.ErrorCodes.CANCEL)
    pair.exchange()
    assert pair.server.resets == 1
    # A window of more than 2**31 - 1 bytes is an error of the stream, which nghttp2 then closes by itself.
    pair.served += pair.server.receive(struct.pack(">HBBBII", 0, 4, 8, 0, streams[2], 2**31 - 1))
    pair.exchange()
    assert pair.server.resets == 2
    late = pair.call(message(b"b"))
    pair.exchange()
    pair.server.answer(late, b"done")
    pair.exchange()
    assert pair.server.resets == 2


def test_what_all_connections_keep_of_unanswered_calls_is_bounded():
    endpoint = Http2Endpoint({ONE: False, MANY: True}, MESSAGE_BYTES_MAX, all_kept_bytes_max=45_000)
    pairs = [Pair(endpoint) for _ in range(2)]
    streams = [pairs[number % 2].begin(MANY, **{"x-long": "a" * 9_000}) for number in range(4)]
    for pair in pairs:
        pair.exchange()
    statuses = [pairs[number % 2].trailers(stream).get("grpc-status") for number, stream in enumerate(streams)]
    assert sorted(statuses, key=str) == ["8", None, None, None], "three fit"
    full = pairs[1]
    begun = full.call(message(bytes(9_000)))
    full.exchange()
    assert full.trailers(begun)["grpc-status"] == "8", "a request's own bytes count, too"
    for number, stream in enumerate(streams):
        pairs[number % 2].server.end(stream, 0)
    for pair in pairs:
        pair.exchange()
    again = full.call(message(bytes(9_000)))
    full.exchange()
    assert full.trailers(again) == {}
    assert full.calls()[-1].stream == again


def test_a_connection_that_ends_gives_back_what_it_kept():
    endpoint = Http2Endpoint({ONE: False, MANY: True}, MESSAGE_BYTES_MAX, all_kept_bytes_max=15_000)
    for _ in range(3):
        pair = Pair(endpoint)
        stream = pair.begin(MANY, **{"x-long": "a" * 9_000})
        pair.exchange()
        assert pair.trailers(stream) == {}
        del pair


def test_metadata_far_beyond_the_limit_is_not_looked_at_to_its_end():
    pair = Pair()
    pair.client.update_settings({})
    over = pair.begin(**{"x-long": "a" * (HEADER_BYTES_MAX + 1)})
    pair.exchange()
    assert pair.trailers(over)["grpc-status"] == "8"
    assert pair.server.resets == 0
    far = pair.begin(**{f"x-{i}": "a" * HEADER_BYTES_MAX for i in range(5)})
    pair.exchange()
    ended = [event for event in pair.answered if isinstance(event, h2.events.StreamReset)]
    assert [event.stream_id for event in ended if event.stream_id == far] == [far]
    assert pair.server.resets == 1


def test_a_client_that_asks_for_too_much_is_told_so():
    pair = Pair()
    pair.server.go_away(calm=True)
    pair.exchange()
    ended = [event for event in pair.answered if isinstance(event, h2.events.ConnectionTerminated)]
    assert [event.error_code for event in ended] == [h2.errors.ErrorCodes.ENHANCE_YOUR_CALM]


def test_a_client_waits_until_its_messages_are_taken():
    pair = Pair()
    stream = pair.begin(MANY)
    sent = 0
    while pair.client.local_flow_control_window(stream) >= 16_384:
        pair.send(stream, message(bytes(16_379)), end=False)
        sent += 1
        pair.exchange()
        assert sent < 100
    messages = [event for event in pair.served if event.kind == EventKind.MESSAGE]
    assert len(messages) == sent >= 16
    for event in messages:
        pair.server.taken(stream, len(event.message))
    pair.exchange()
    assert pair.client.local_flow_control_window(stream) >= 16_384


def test_a_connection_keeps_a_limited_number_of_bytes(monkeypatch):
    each = MESSAGE_BYTES_MAX + (4 << 10) + 200  # with the call itself and its metadata
    monkeypatch.setattr("server.edge.http2._KEPT_MESSAGES", 0)
    monkeypatch.setattr("server.edge.http2.KEPT_BYTES_MIN", 15 * each + MESSAGE_BYTES_MAX)
    pair = Pair()
    unfinished = message(bytes(MESSAGE_BYTES_MAX))[:-1]
    streams = []
    for _ in range(17):
        streams.append(pair.begin())
        pair.send(streams[-1], unfinished, end=False)
        pair.exchange()
    assert [pair.trailers(stream).get("grpc-status") for stream in streams] == [None] * 15 + ["8", "8"]
    assert "too many bytes" in pair.trailers(streams[-1])["grpc-message"]
    pair.send(streams[0], b"a")
    pair.exchange()
    pair.server.answer(streams[0], b"done")
    pair.exchange()
    assert pair.trailers(streams[0])["grpc-status"] == "0"
    pair.exchange()
    assert pair.calls()[0].message == unfinished[5:] + b"a"
    stream = pair.call(message(b"a" * 90_000))
    pair.exchange()
    assert pair.calls()[-1].stream == stream


def test_messages_count_until_their_handler_is_done_with_them():
    endpoint = Http2Endpoint({ONE: False, MANY: True}, MESSAGE_BYTES_MAX, all_kept_bytes_max=60_000)
    pair = Pair(endpoint)
    streams = [pair.begin(MANY) for _ in range(2)]
    for stream in streams:
        pair.send(stream, message(bytes(12_000)), end=False)
        pair.exchange()
    assert [pair.trailers(stream).get("grpc-status") for stream in streams] == [None, None]
    assert pair.server.keep(streams[0], 24_000), "what its objects take"
    assert not pair.server.keep(streams[1], 24_000)
    late = pair.begin(MANY)
    pair.send(late, message(bytes(12_000)), end=False)
    pair.exchange()
    assert pair.trailers(late)["grpc-status"] == "8"
    pair.server.taken(streams[0], 12_000, 24_000)
    assert pair.server.keep(streams[1], 24_000)
    pair.server.end(streams[1], 0)
    pair.client.reset_stream(streams[1])
    pair.exchange()
    again = pair.begin(MANY)
    pair.send(again, message(bytes(40_000)), end=False)
    pair.exchange()
    assert pair.trailers(again) == {}, "a call that is over gives back all"


def test_a_connection_cannot_take_the_last_of_what_all_may_keep():
    endpoint = Http2Endpoint({ONE: False, MANY: True}, MESSAGE_BYTES_MAX, all_kept_bytes_max=600_000)
    greedy, modest = Pair(endpoint), Pair(endpoint)
    streams = []
    for _ in range(200):
        streams.append(greedy.begin(MANY))
        greedy.exchange()
    held = [stream for stream in streams if greedy.trailers(stream) == {}]
    assert 65 <= len(held) <= 73, "half of it, at 4,096 bytes a call and its metadata"
    stream = modest.call(message(bytes(90_000)))
    modest.exchange()
    assert modest.trailers(stream) == {}
