"""A client, which is h2, and the server's side of its connection, without sockets between them."""

from __future__ import annotations

import struct

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

from server.edge.http2 import (
    Event,
    EventKind,
    Http2Connection,
    Http2Endpoint,
)

MESSAGE_BYTES_MAX = 100_000
ONE, MANY = "/test/One", "/test/Many"
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": ONE,
    ":authority": "test",
    "te": "trailers",
    "content-type": "application/grpc",
}


class Pair:
    """A client, which is h2, and the server's side of its connection."""

    def __init__(self, endpoint: Http2Endpoint | None = None) -> None:
        self.server = Http2Connection(endpoint or Http2Endpoint({ONE: False, MANY: True}, MESSAGE_BYTES_MAX))
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.client.initiate_connection()
        self.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
        self.client.increment_flow_control_window(1 << 24)
        #: What happened at the server, and at the client.
        self.served: list[Event] = []
        self.answered: list[h2.events.Event] = []
        self.exchange()

    def exchange(self, cuts: list[int] | None = None) -> None:
        """Carry bytes both ways until nobody has any. `cuts` are the sizes in which they reach the server."""
        sizes = iter(cuts or [])
        while True:
            to_server = self.client.data_to_send()
            left = to_server
            while left:
                size = next(sizes, len(left))
                self.served += self.server.receive(left[:size])
                left = left[size:]
            content, events = self.server.send()
            self.served += events
            if content:
                self.answered += self.client.receive_data(content)
            elif not to_server:
                return

    def begin(self, path: str = ONE, **headers: str) -> int:
        stream: int = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, list((HEADERS | {":path": path} | headers).items()))
        return stream

    def send(self, stream: int, content: bytes, *, end: bool = True) -> None:
        """Send bytes in frames that the server's windows have room for."""
        while content:
            room = min(self.client.local_flow_control_window(stream), self.client.max_outbound_frame_size)
            if not room:
                self.exchange()
                continue
            self.client.send_data(stream, content[:room])
            content = content[room:]
        if end:
            self.client.end_stream(stream)

    def call(self, content: bytes, **headers: str) -> int:
        stream = self.begin(**headers)
        self.send(stream, content)
        return stream

    def calls(self) -> list[Event]:
        return [event for event in self.served if event.kind == EventKind.CALL]

    def trailers(self, stream: int) -> dict[str, str]:
        """Return the status that the client got."""
        for event in self.answered:
            headers = dict(getattr(event, "headers", None) or ())
            if getattr(event, "stream_id", 0) == stream and "grpc-status" in headers:
                return headers
        return {}

    def data(self, stream: int) -> bytes:
        received = (event for event in self.answered if isinstance(event, h2.events.DataReceived))
        return b"".join(event.data for event in received if event.stream_id == stream)


def message(content: bytes, compressed: int = 0, size: int | None = None) -> bytes:
    return struct.pack(">BI", compressed, len(content) if size is None else size) + content
