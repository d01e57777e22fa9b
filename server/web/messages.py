"""One request's head and one response of the HTTP port, as bytes (RFC 9112). Pure.

The port answers GET and HEAD of a few short paths, once per connection, so a request's body and most of its header
fields mean nothing to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus

#: Maximum size of a request's head; browsers send about 1 KiB.
HEAD_BYTES_MAX = 8_192
_METHODS = ("GET", "HEAD")
_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:.*")
_GZIP = re.compile(r"(?:^|[\s,])(?:x-)?gzip\s*(?:;\s*q\s*=\s*(?!0(?:\.0*)?\s*(?:,|$))[^,]*)?(?:,|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The head has not arrived completely."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request.

    Attributes:
        method: GET or HEAD.
        path: the path, without the query.
        gzip: whether the client accepts a body that is compressed with gzip.
    """

    method: str
    path: str
    gzip: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """A response; `fields` are header fields beside those that every response has."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    fields: tuple[tuple[str, str], ...] = ()

    def encoded(self, *, with_body: bool) -> bytes:
        """Return the bytes to send; a response to HEAD has no body, but the length of the one that GET would get."""
        fields = (
            ("Content-Type", self.content_type), ("Content-Length", str(len(self.body))),
            ("Cache-Control", "no-store"), ("Connection", "close"), *self.fields,
        )  # fmt: skip
        head = [f"HTTP/1.1 {self.status.value} {self.status.phrase}", *(f"{name}: {value}" for name, value in fields)]
        return "\r\n".join([*head, "", ""]).encode() + (self.body if with_body else b"")


def text(status: HTTPStatus, *lines: str, fields: tuple[tuple[str, str], ...] = ()) -> Response:
    """Return a response of plain text."""
    return Response(status, "".join(f"{line}\n" for line in lines).encode(), fields=fields)


def read_request(received: bytes) -> Request | Response | Incomplete:
    """Read a request's head from the bytes that have arrived so far; a response refuses the request."""
    head, end, _ = received.partition(b"\r\n\r\n")
    if len(head) > HEAD_BYTES_MAX:
        return text(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request's head has more than {HEAD_BYTES_MAX} bytes"
        )
    if not received[:1].isalpha() and received:
        return text(HTTPStatus.BAD_REQUEST, "not an HTTP request")  # such as TLS where there is none
    if not end:
        return Incomplete()
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/"):
        return text(HTTPStatus.BAD_REQUEST, "the first line is not METHOD /path HTTP/1.1")
    method, target, version = words
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        return text(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this port speaks HTTP/1.0 and HTTP/1.1")
    if method not in _METHODS:
        allow = ", ".join(_METHODS)
        return text(HTTPStatus.METHOD_NOT_ALLOWED, f"this port answers {allow}", fields=(("Allow", allow),))
    if not target.startswith("/") or not all(_FIELD.fullmatch(field) for field in fields):
        return text(HTTPStatus.BAD_REQUEST, "the path does not begin with /, or a header line is not Name: value")
    accepted = (field.partition(":")[2] for field in fields if field.lower().startswith("accept-encoding:"))
    return Request(method, target.partition("?")[0], any(_GZIP.search(one) for one in accepted))
