"""The candidates' ids, read by the native library, against protobuf's own parser."""

from __future__ import annotations

import random

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from pinrank.v1 import ranking_pb2
from server.api import wire
from server.api.wire import parse_request
from server.errors import InvalidRequestError

IDS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 9))
FIELDS = {
    "user_id": st.integers(0, 2**64 - 1),
    "pin_ids": st.lists(IDS, max_size=300),
    "surface": st.text(max_size=20),
    "label": st.text(max_size=5),
    "version": st.integers(0, 2**64 - 1),
    "top_k": st.integers(0, 2**32 - 1),
    "explain": st.booleans(),
}
PART = st.sampled_from([{name} for name in FIELDS]).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


def by_protobuf(content):
    """The message without its ids, its ids, and whether they differ; None if it is no message."""
    try:
        message = ranking_pb2.RankRequest.FromString(content)
    except DecodeError:
        return None
    pin_ids = list(message.pin_ids)
    message.ClearField("pin_ids")
    return message, pin_ids, len(set(pin_ids)) == len(pin_ids)


def parsed(content):
    try:
        found = parse_request(content)
    except InvalidRequestError:
        return None
    assert found.pin_ids.dtype == np.uint64
    assert not found.message.pin_ids or list(found.message.pin_ids) == found.pin_ids.tolist()
    found.message.ClearField("pin_ids")
    return found.message, found.pin_ids.tolist(), found.distinct


@given(parts=st.lists(PART, max_size=6))
def test_messages_in_any_order_of_fields_mean_the_same(parts):
    content = b"".join(ranking_pb2.RankRequest(**part).SerializeToString() for part in parts)
    assert parsed(content) == by_protobuf(content)


@given(parts=st.lists(PART, max_size=4), seed=st.integers(0, 2**32))
def test_damaged_messages_mean_the_same_or_are_refused_alike(parts, seed):
    rng = random.Random(seed)
    content = bytearray(b"".join(ranking_pb2.RankRequest(**part).SerializeToString() for part in parts))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        content[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
    assert parsed(bytes(content)) == by_protobuf(bytes(content))


@given(st.binary(max_size=40))
@example(b"\x12\x08" + bytes(7))
@example(b"\x12\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x12\x07" + bytes(7))
@example(b"\x11" + bytes(8) + b"\x12\x08" + bytes(8))
@example(b"\x0b\x0c\x12\x08" + bytes(8))
@example(b"\x02\x00\x12\x08" + bytes(8))
@example(b"")
def test_any_bytes_mean_the_same_or_are_refused_alike(content):
    assert parsed(content) == by_protobuf(content)


def test_the_usual_request_is_read_by_the_library():
    content = ranking_pb2.RankRequest(user_id=7, pin_ids=[3, 1, 2], surface="home").SerializeToString()
    found = parse_request(content)
    assert not found.message.pin_ids
    assert (found.message.user_id, found.message.surface) == (7, "home")
    assert found.pin_ids.tolist() == [3, 1, 2]


@pytest.mark.parametrize("pin_ids", [[], [3, 1, 2], [3, 1, 3]])
def test_without_the_library_requests_mean_the_same(pin_ids, monkeypatch):
    monkeypatch.setattr(wire, "_native", lambda: None)
    content = ranking_pb2.RankRequest(user_id=7, pin_ids=pin_ids).SerializeToString()
    assert parsed(content) == by_protobuf(content)


@pytest.mark.parametrize("repeated", [[], [0], [499]])
def test_ids_that_collide_are_compared_all_the_same(monkeypatch, repeated):
    # Multiples of the inverse of the hash's factor fall on one place after the other.
    factor = 0x9E3779B97F4A7C15
    monkeypatch.setattr(wire, "_MULTIPLIER", factor)
    inverse = pow(factor, -1, 2**64)
    ids = [(number * inverse) % 2**64 for number in [*range(500), *repeated]]
    content = ranking_pb2.RankRequest(pin_ids=ids).SerializeToString()
    assert parsed(content) == by_protobuf(content)
