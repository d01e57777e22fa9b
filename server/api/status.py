"""Converts an error to a gRPC status (code, message, details) that fits into gRPC's metadata. Pure.

gRPC replaces a status whose trailers exceed 8 KiB (its default soft limit) with RESOURCE_EXHAUSTED. It percent-encodes
the message, encodes the details as base64, and the details repeat the message: with the limits below, a status takes at
most 5.5 KiB.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from server.errors import STATUS, FieldViolation, InvalidRequestError, OverloadedError, RankError, StatusError

MESSAGE_BYTES_MAX = 1_000
_VIOLATIONS_BYTES_MAX = 2_000
_FIELD_BYTES_MAX, _DESCRIPTION_BYTES_MAX = 120, 500
_LISTED_BYTES_MAX = 200
#: Maximum retry delay sent to a client; one told to wait longer should use another server.
_RETRY_MAX_S = 3_600.0

Status = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]


def code_of(error: RankError) -> grpc.StatusCode:
    return error.code if isinstance(error, StatusError) else STATUS[type(error)]


def status_of(error: RankError, remaining_s: float | None = None) -> Status:
    """Return an error's code, message and trailers. Problems that do not fit are left out and counted.

    Args:
        error: the error.
        remaining_s: time until the call's deadline; None if it has none.
    """
    code = code_of(error)
    match error:
        case InvalidRequestError():
            shown, count = _shown(error.violations), len(error.violations) + error.more
            message = _message(shown, count)
            listed_violations = [*shown, FieldViolation("", _more(count - len(shown)))] if count > len(shown) else shown
            one = error_details_pb2.BadRequest.FieldViolation
            details = error_details_pb2.BadRequest(
                field_violations=[one(field=v.field, description=v.description) for v in listed_violations]
            )
            packed = any_pb2.Any()
            packed.Pack(details)
            status = status_pb2.Status(code=code.value[0], message=message, details=[packed])
            return code, message, tuple(rpc_status.to_status(status).trailing_metadata)
        case OverloadedError(retry_after_s=retry_after_s):
            # A negative time tells a client's retry policy to give up: after the deadline no answer is of use.
            worth_it = remaining_s is None or retry_after_s < remaining_s
            retry_ms = max(1, round(min(retry_after_s, _RETRY_MAX_S) * 1e3)) if worth_it else -1
            pushback = ("grpc-retry-pushback-ms", str(retry_ms))
            return code, within(str(error), MESSAGE_BYTES_MAX), (pushback,)
    return code, within(str(error), MESSAGE_BYTES_MAX), ()


def within(text: str, bytes_max: int) -> str:
    """Return a text of at most `bytes_max` header bytes; a longer one is cut, and its original length appended."""
    whole = len(text)
    # A character takes a byte at least, so the rest of a long text need not be looked at.
    text = text[: bytes_max + 1].encode(errors="replace").decode()  # a file name may not be valid UTF-8
    if whole == len(text) and _header_bytes(text) <= bytes_max:
        return text
    note = f"... ({whole} characters)"
    room, kept = bytes_max - len(note), 0
    for character in text:
        room -= _header_bytes(character)
        if room < 0:
            break
        kept += 1
    return text[:kept] + note


def listed(names: Iterable[object]) -> str:
    """Return names joined by commas; if there are too many, only the first ones and the number of the rest."""
    every = [str(name) for name in names]
    shown: list[str] = []
    room = _LISTED_BYTES_MAX
    for name in every:
        room -= _header_bytes(name) + 2
        if room < 0:
            break
        shown.append(name)
    left = len(every) - len(shown)
    return ", ".join([*shown, *([f"and {left} more"] if left else [])])


def _header_bytes(text: str) -> int:
    """Return a text's size in bytes after gRPC has percent-encoded it."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


def _shown(violations: Iterable[FieldViolation]) -> list[FieldViolation]:
    """Return the first violations that fit into `_VIOLATIONS_BYTES_MAX`, each cut to its own limits."""
    shown: list[FieldViolation] = []
    room = _VIOLATIONS_BYTES_MAX
    for violation in violations:
        one = FieldViolation(
            within(violation.field, _FIELD_BYTES_MAX), within(violation.description, _DESCRIPTION_BYTES_MAX)
        )
        room -= len(one.field.encode()) + len(one.description.encode()) + 8
        if room < 0:
            break
        shown.append(one)
    return shown


def _message(shown: Iterable[FieldViolation], count: int) -> str:
    """Return the first violations that fit into a message as text, and how many of all `count` are left out."""
    parts: list[str] = []
    room = MESSAGE_BYTES_MAX - len(_more(count)) - 2
    for violation in shown:
        part = f"{violation.field}: {violation.description}" if violation.field else violation.description
        room -= _header_bytes(part) + 2
        if room < 0:
            break
        parts.append(part)
    left = count - len(parts)
    return "; ".join([*parts, *([_more(left)] if left else [])])


def _more(count: int) -> str:
    return f"{count} more problems are not listed"
