"""Hostile inputs for both ports, each drawn from its number: calls, HTTP/2 frames, TLS greetings, HTTP requests."""

from __future__ import annotations

import random
import string
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from bench.attacks import frames
from pinrank.v1 import activity_pb2, impressions_pb2, models_pb2, ranking_pb2

_FILES = (ranking_pb2, activity_pb2, impressions_pb2, models_pb2, health_pb2, reflection_pb2)
METHODS: tuple[MethodDescriptor, ...] = tuple(
    method for file in _FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
)
RANK = next(method for method in METHODS if method.name == "Rank")
_WORDS = (
    "",
    "home",
    "related",
    "stable",
    "canary",
    "save",
    "hide",
    "tiny@1",
    "*",
    "é" * 20,
    "\0",
    "../..",
    "a" * 5_000,
)
_TEXT = string.ascii_letters + string.digits + " !#$%&'()*+,-./:;<=>?@[]^_`{|}~"
_KEY = string.ascii_lowercase + string.digits + "-_."
_DEPTH_MAX = 4
_PAGES = ("/metrics", "/livez", "/readyz", "/startupz", "/healthz", "/", "/../etc/passwd", "/%00", "*", "//", "")


@dataclass(frozen=True, slots=True)
class RpcCase:
    """A call through a gRPC client: its path, message, metadata and deadline."""

    path: str
    content: bytes
    metadata: tuple[tuple[str, str | bytes], ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class RawCase:
    """Bytes for a new connection: to the HTTP port or the gRPC port; `hangs_up` closes it without a farewell."""

    kind: str
    content: bytes
    to_http: bool
    hangs_up: bool


def case(number: int, seed: int, tokens: Sequence[str]) -> RpcCase | RawCase:
    """Return a case.

    Args:
        number: the case; equal numbers and seeds give equal cases.
        seed: of all cases.
        tokens: valid tokens, some of which are sent whole, and more of them changed.
    """
    rng = random.Random(f"{seed}:{number}")
    drawn = rng.random()
    if drawn < 0.8:
        return _rpc(rng, tokens)
    hangs_up = rng.random() < 0.3
    if drawn < 0.9:
        return RawCase("frames", _conversation(rng, tokens), rng.random() < 0.1, hangs_up)
    if drawn < 0.95:
        return RawCase("tls", _hello(rng), rng.random() < 0.5, hangs_up)
    return RawCase("http", _http(rng, tokens), rng.random() < 0.9, hangs_up)


def _rpc(rng: random.Random, tokens: Sequence[str]) -> RpcCase:
    method = RANK if rng.random() < 0.3 else rng.choice(METHODS)
    path = f"/{method.containing_service.full_name}/{method.name}"
    if rng.random() < 0.03:
        path = rng.choice((path + "x", "/", "/a/b", path.lower(), "/" + "x" * 500))
    content = _content(rng, method.input_type)
    return RpcCase(path, content, _metadata(rng, tokens), rng.choice((0.001, 0.01, 0.1, 1.0, 1.0)))


def _content(rng: random.Random, kind: Descriptor) -> bytes:
    drawn = rng.random()
    if drawn < 0.1:
        return rng.randbytes(rng.randrange(400))
    if drawn < 0.4 and kind.name == "RankRequest":
        count = rng.choice((1, 5, 50))
        return ranking_pb2.RankRequest(
            user_id=rng.randrange(500), pin_ids=rng.sample(range(2_000), count), surface="home", top_k=rng.randrange(60)
        ).SerializeToString()
    content: bytes = _message(rng, kind, 0).SerializeToString()
    return mutated(rng, content) if drawn > 0.75 else content


def _message(rng: random.Random, kind: Descriptor, depth: int) -> Any:
    """Return a message with some of its fields set to values that are typical, extreme or senseless."""
    made = GetMessageClass(kind)()
    for field in kind.fields:
        if rng.random() < 0.3:
            continue
        is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
        if is_message and depth == _DEPTH_MAX:
            continue
        if field.is_repeated:
            count = rng.choice((0, 1, 3, 40))
            values = [_value(rng, field, depth) for _ in range(count if not is_message else min(count, 5))]
            getattr(made, field.name).extend(values)
        elif is_message:
            getattr(made, field.name).CopyFrom(_value(rng, field, depth))
        else:
            setattr(made, field.name, _value(rng, field, depth))
    return made


def _value(rng: random.Random, field: FieldDescriptor, depth: int) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            assert field.message_type is not None  # noqa: S101 - a message has a type
            return _message(rng, field.message_type, depth + 1)
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return rng.randbytes(rng.randrange(20))
            return rng.choice(_WORDS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None  # noqa: S101 - an enumeration has one
            return rng.choice(field.enum_type.values).number
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice((0.0, 1.0, -1e30, float("nan"), float("inf"), rng.random()))
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.choice((0, 1, -1, 2**31 - 1, -(2**31)))
        case FieldDescriptor.CPPTYPE_INT64:
            return rng.choice((0, 1, -1, 1_700_000_000_000, 2**63 - 1, -(2**63)))
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice((0, 1, 7, 2**32 - 1))
        case _:
            return rng.choice((0, 1, rng.randrange(2_000), 2**63, 2**64 - 1, rng.getrandbits(64)))


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a few of them changed, inserted, repeated or cut off."""
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                changed[at:at] = changed[at : at + rng.randrange(64)]
            case _:
                del changed[at : at + rng.randrange(1, 33)]
    return bytes(changed)


def _authorization(rng: random.Random, tokens: Sequence[str]) -> str:
    token = rng.choice(tokens)
    at = rng.randrange(len(token))
    return rng.choice((
        f"Bearer {token}", f"Bearer {token}", f"Bearer {token[:at]}", f"Bearer {token[:at]}x{token[at + 1 :]}",
        f"bearer {token}", f"Bearer  {token}", token, "Basic YTpi", "Bearer", "Bearer a.b.c", "Bearer " + "x" * 3_000,
    ))  # fmt: skip


def _metadata(rng: random.Random, tokens: Sequence[str]) -> tuple[tuple[str, str | bytes], ...]:
    """Return metadata that a gRPC client lets pass: mostly a caller's token, and sometimes anything else."""
    made: list[tuple[str, str | bytes]] = []
    if rng.random() < 0.7:
        made.append(("authorization", f"Bearer {tokens[0]}"))
    if rng.random() < 0.3:
        made.append(("authorization", _authorization(rng, tokens)))
    for _ in range(rng.choice((0, 0, 0, 1, 5, 40))):
        name = "x" + "".join(rng.choices(_KEY, k=rng.randrange(20)))
        if rng.random() < 0.3:
            made.append((name + "-bin", rng.randbytes(rng.randrange(100))))
        elif not name.endswith("-bin"):
            made.append((name, "".join(rng.choices(_TEXT, k=rng.choice((0, 5, 300)))).strip()))
    return tuple(made)


def _conversation(rng: random.Random, tokens: Sequence[str]) -> bytes:
    """Return what a client would send on a connection, with faults at one of the layers."""
    parts = [frames.frame(frames.SETTINGS, 0, 0, b"" if rng.random() < 0.7 else rng.randbytes(rng.choice((6, 12, 7))))]
    for stream in range(1, 2 * rng.randrange(1, 9), 2):
        method = RANK if rng.random() < 0.5 else rng.choice(METHODS)
        more = [(b"authorization", _authorization(rng, tokens).encode())]
        for _ in range(rng.randrange(4)):
            further: tuple[tuple[bytes, bytes], ...] = (
                (b"grpc-timeout", rng.choice((b"1S", b"10m", b"-1S", b"99999999H", b"", b"1"))),
                (b"grpc-encoding", rng.choice((b"gzip", b"snappy", b"identity"))),
                (rng.randbytes(rng.randrange(9)), rng.randbytes(rng.randrange(40))),
                (b"Upper", b"case"), (b"connection", b"close"), (b":path", b"/twice"), (b"x", b"y" * 9_000),
                (b"content-length", b"5"), (b"te", b"gzip"), (b"a-bin", b"!!!"),
            )  # fmt: skip
            more.append(rng.choice(further))
        path = f"/{method.containing_service.full_name}/{method.name}".encode()
        block = frames.header_block(frames.call_headers(path, more))
        parts.append(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block))
        body = b""
        for _ in range(rng.choice((1, 1, 1, 1, 1, 0, 2, 3))):
            content = _content(rng, method.input_type)
            size = len(content) if rng.random() < 0.9 else rng.getrandbits(32)
            body += struct.pack(">BI", rng.choice((0, 0, 0, 0, 1, 2)), size) + content
        parts.append(frames.frame(frames.DATA, frames.END_STREAM, stream, body))
    for _ in range(rng.randrange(3)):
        # Streams, flags and kinds that make no sense where they are.
        wild = frames.frame(
            rng.randrange(14), rng.getrandbits(8), rng.choice((0, 1, 2, 3, 2**31 - 1)), rng.randbytes(9)
        )
        parts.insert(rng.randrange(len(parts) + 1), wild)
    at = rng.randrange(len(parts))
    if rng.random() < 0.5:
        parts[at] = mutated(rng, parts[at])
    preface = frames.PREFACE if rng.random() < 0.95 else mutated(rng, frames.PREFACE)
    return preface + b"".join(parts)


def _hello(rng: random.Random) -> bytes:
    """Return how a client begins TLS 1.3 (RFC 8446, section 4.1.2): as it is, changed, or mostly random."""
    if rng.random() < 0.2:
        return (
            b"\x16\x03" + rng.randbytes(1) + struct.pack(">H", rng.randrange(600)) + rng.randbytes(rng.randrange(600))
        )
    extensions = {
        0: _sized(2, b"\0" + _sized(2, b"localhost")),  # server_name
        10: _sized(2, b"\0\x1d"),  # supported_groups: x25519
        13: _sized(2, b"\x04\x03\x08\x04"),  # signature_algorithms
        16: _sized(2, _sized(1, b"h2") + _sized(1, b"http/1.1")),  # application_layer_protocol_negotiation
        43: _sized(1, b"\x03\x04\x03\x03"),  # supported_versions
        51: _sized(2, b"\0\x1d" + _sized(2, rng.randbytes(32))),  # key_share
        rng.randrange(1 << 16): rng.randbytes(rng.randrange(40)),
    }
    chosen = rng.sample(sorted(extensions), rng.randrange(3, len(extensions) + 1))
    body = (
        b"\x03\x03" + rng.randbytes(32) + _sized(1, rng.randbytes(rng.choice((0, 32))))
        + _sized(2, b"\x13\x01\x13\x02\xc0\x2f") + _sized(1, b"\0")
        + _sized(2, b"".join(struct.pack(">H", kind) + _sized(2, extensions[kind]) for kind in chosen))
    )  # fmt: skip
    content = b"\x16\x03\x01" + _sized(2, b"\x01" + _sized(3, body))
    return mutated(rng, content) if rng.random() < 0.6 else content


def _sized(length_bytes: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_bytes, "big") + content


def _http(rng: random.Random, tokens: Sequence[str]) -> bytes:
    method = rng.choice(("GET", "GET", "GET", "HEAD", "POST", "OPTIONS", "get", "PRI", "X" * 100))
    page = rng.choice(_PAGES) + rng.choice(("", "", "?a=b", "#", "x" * 9_000))
    lines = [f"{method} {page} HTTP/{rng.choice(('1.1', '1.1', '1.0', '2.0', '9'))}"]
    headers = (
        "Host: localhost", "Connection: close", f"Authorization: {_authorization(rng, tokens)}", "Content-Length: 5",
        "Content-Length: -1", "Transfer-Encoding: chunked", "Upgrade: h2c", "Expect: 100-continue", ": empty",
        "no colon", " folded", "X: " + "y" * 9_000, "Accept-Encoding: gzip", "Accept: application/openmetrics-text",
    )  # fmt: skip
    lines += rng.choices(headers, k=rng.randrange(6))
    content = "\r\n".join([*lines, "", ""]).encode() + rng.choice((b"", b"", b"hello"))
    return mutated(rng, content) if rng.random() < 0.4 else content
