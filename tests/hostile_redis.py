"""A server that speaks just enough of Redis to be trusted, and then answers whatever a test wants."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping

#: From a command's words to the bytes that are sent back.
Answer = Callable[[list[bytes]], bytes]


def honest(values: Mapping[bytes, bytes]) -> Answer:
    """Answer as a Redis that holds these values and takes writes without keeping them."""

    def answer(words: list[bytes]) -> bytes:
        match words[0].upper(), words[1:]:
            case b"HELLO", _:
                return b"%1\r\n$5\r\nproto\r\n:3\r\n"
            case b"PING", _:
                return b"+PONG\r\n"
            case b"MGET", keys:
                return b"*%d\r\n" % len(keys) + b"".join(map(_bulk, map(values.get, keys)))
            case b"GET", [key]:
                return _bulk(values.get(key))
            case b"EVAL", _:
                return b":1\r\n"
        return b"+OK\r\n"

    return answer


def echoing_error(words: list[bytes]) -> bytes:
    """Refuse a command as Redis does one that it does not know: with all that stood in it."""
    arguments = b" ".join(b"'" + word + b"'" for word in words[1:])
    said = b"-ERR unknown command '" + words[0] + b"', with args beginning with: " + arguments
    return said.replace(b"\r", b" ").replace(b"\n", b" ") + b"\r\n"


def echo(words: list[bytes]) -> bytes:
    """Send back what came, which is no reply at all."""
    return b"?".join(words) + b"\r\n"


def wrong_type(words: list[bytes]) -> bytes:
    return b":7\r\n"


class HostileRedis:
    """Answers every connection by `answer`, which a test may replace at any time."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        outer = self

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    while words := _command(self.rfile):
                        self.wfile.write(outer.answer(words))

        class Listener(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Listener(("127.0.0.1", 0), Connection)
        self.port: int = self._server.server_address[1]

    @contextlib.contextmanager
    def listening(self) -> Iterator[HostileRedis]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _command(file) -> list[bytes]:
    line = file.readline()
    if not line:
        return []
    words = []
    for _ in range(int(line[1:])):
        length = int(file.readline()[1:])
        words.append(file.read(length))
        file.readline()
    return words


def _bulk(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else b"$%d\r\n" % len(value) + value + b"\r\n"
