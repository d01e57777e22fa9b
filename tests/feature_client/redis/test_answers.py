"""The native reader of an MGET's reply beside the reader of all other replies: it gives and refuses the same."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.exceptions import RedisError

from feature_client.stores.redis.answers import Commands, GetMany, Replies, ValuesReader
from feature_client.stores.redis.resp import Bounds, Incomplete, MalformedReplyError
from feature_client.values.keys import KeyRun, Keys
from feature_client.values.native_values import native_values
from feature_client.values.stored_values import StoredValues
from tests import tiny
from tests.scripted_redis import array, bulk

CASES = int(os.environ.get("PINRANK_FUZZ_CASES", "300"))
NUMBER = b"1f"
SMALL = Bounds(size_bytes=150, elements=40, depth=3, line_bytes=40)

native = pytest.mark.skipif(native_values() is None, reason="the native library is not built")


def written(value: bytes | None) -> bytes:
    return b"$-1\r\n" if value is None else bulk(value)


def fed(reader, content: bytes, cuts: list[int]):
    """What a reader says after each piece, up to its first answer or error."""
    stops = sorted({min(cut, len(content)) for cut in cuts} | {len(content)})
    said: list[object] = []
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        if start == stop:
            continue
        try:
            found = reader.feed(content[start:stop])
        except RedisError as error:
            return [*said, (type(error), str(error))]
        if found is not Incomplete.INCOMPLETE:
            (reply,) = found
            return [*said, str(reply) if isinstance(reply, Exception) else list(reply)]
        said.append(found)
    return said


def agree(content: bytes, cuts: list[int], count: int, bounds: Bounds) -> None:
    loaded = native_values()
    assert loaded is not None
    assert fed(ValuesReader(loaded, count, NUMBER, bounds), content, cuts) == fed(
        Replies.of_values(count, NUMBER, bounds), content, cuts
    )


values = (
    st.none() | st.binary(max_size=8) | st.binary(min_size=6, max_size=6) | st.sampled_from([b"\r\n*9\r\n", b"$-1\r\n"])
)
pieces = st.lists(st.integers(0, 200), max_size=12)


@native
@settings(max_examples=CASES, deadline=None)
@given(st.lists(values, min_size=1, max_size=12), pieces)
def test_values_are_read_whatever_the_pieces_they_come_in(them, cuts):
    content = array(*map(written, them)) + bulk(NUMBER)
    reader = ValuesReader(native_values(), len(them), NUMBER)
    stops = sorted({min(cut, len(content)) for cut in cuts} | {0, len(content)})
    for start, stop in pairwise(stops):
        found = reader.feed(content[start:stop])
        assert (found is Incomplete.INCOMPLETE) == (stop < len(content))
    (read,) = found
    assert isinstance(read, StoredValues)
    assert read == them


@st.composite
def damaged(draw):
    them = draw(st.lists(values, min_size=1, max_size=6))
    content = bytearray(array(*map(written, them)) + bulk(NUMBER))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["replace", "insert", "cut", "drop", "add"])):
            case "replace":
                content[at : at + 1] = draw(st.sampled_from([b"*", b"$", b":", b"9", b"0", b"-", b"\r", b"\n", b"_"]))
            case "insert":
                content[at:at] = draw(
                    st.sampled_from(
                        [b"\r\n", b"*2147483647\r\n", b"$-2\r\n", b"00", b"$99999999999\r\n", b"+", b":1\r\n"]
                    )
                )
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + 1]
            case "add":
                content += draw(st.sampled_from([b"\r\n", b"$-1\r\n", b"-ERR no\r\n", bulk(NUMBER)]))
    return bytes(content), len(them)


@native
@settings(max_examples=3 * CASES, deadline=None)
@given(damaged(), pieces, st.sampled_from([0, 0, 0, 1, -1]), st.sampled_from([SMALL, Bounds()]))
@example((b"*1\r\n$00000000000000000003\r\nabc\r\n$2\r\n1f\r\n", 1), [], 0, SMALL)
@example((b"*1\r\n$-01\r\n$2\r\n1f\r\n", 1), [9], 0, SMALL)
@example((b"*1\r\n$140\r\n", 1), [], 0, SMALL)
@example((b"*01\r\n$-1\r\n$2\r\n1f\r\n", 1), [], 0, SMALL)
def test_damaged_replies_are_read_and_refused_as_by_the_reader_of_all_replies(case, cuts, more, bounds):
    content, count = case
    agree(content, cuts, max(1, count + more), bounds)


@native
@pytest.mark.parametrize(
    "answer",
    [
        array(bulk(b"abc"), b"$-1\r\n", bulk(b"")) + bulk(NUMBER),
        array(bulk(b"abc"), b"$-1\r\n", bulk(b"")) + bulk(NUMBER) + b"+OK\r\n",
        array(bulk(b"abc"), b"$-1\r\n", bulk(b"")) + bulk(b"20"),
        array(bulk(b"abc"), b"$-1\r\n", b":1\r\n") + bulk(NUMBER),
        array(bulk(b"abc"), bulk(b"de")) + bulk(NUMBER),
        b"-ERR no\r\n" + bulk(NUMBER),
        b"-LOADING no\r\n" + bulk(NUMBER),
        b"-MOVED 1 127.0.0.1:1\r\n" + bulk(NUMBER),
        array(bulk(b"abc"), b"$-1\r\n", bulk(b"")) + b"-NOPERM no\r\n",
        b"*2147483647\r\n", b"*1\r\n" * 10, b"$2147483647\r\nabc", b"HTTP/1.1 400 Bad Request\r\n\r\n",
        array(*[b"$3\r\nabcd\r\n"] * 3), bytes(range(256)), b"\r\n" * 9, b"*3\r\n+" + b"a" * 9_000,
    ],
)  # fmt: skip
def test_hostile_replies_are_refused_the_same_at_every_byte(answer):
    agree(answer, list(range(len(answer))), 3, Bounds())
    agree(answer, [], 3, Bounds())
    for cut in range(1, min(len(answer), 100)):
        agree(answer[:cut], [], 3, Bounds())
        agree(answer, [cut], 3, Bounds())


@native
def test_a_reply_that_never_ends_is_refused_at_its_bound():
    reader, sent = ValuesReader(native_values(), 1_000, NUMBER, Bounds(size_bytes=1 << 14)), 0
    reader.feed(b"*1000\r\n")
    with pytest.raises(MalformedReplyError, match="more than 16384 bytes"):  # noqa: PT012 - at which piece, is asked below
        while True:
            sent += 970
            reader.feed(bulk(bytes(90)) * 10)
    assert 1 << 14 <= sent < (1 << 14) + 2_000


@given(
    st.lists(st.binary(min_size=1, max_size=20), max_size=4),
    st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=5), max_size=3),
)
def test_keys_in_runs_are_packed_like_keys_of_their_own(single, runs):
    keys = Keys(single, [KeyRun(b"group%d@1:" % i, np.array(ids, np.uint64)) for i, ids in enumerate(runs)])
    listed = [*single, *(b"group%d@1:" % i + id_.to_bytes(8, "big") for i, ids in enumerate(runs) for id_ in ids)]
    assert list(keys) == listed
    assert len(keys) == len(listed)
    assert [keys[i] for i in range(len(listed))] == listed
    assert GetMany(keys).packed(NUMBER) == Commands([("MGET", *listed)]).packed(NUMBER)


def test_a_run_holds_the_keys_of_its_group():
    ids = np.array([1, 2**64 - 1], np.uint64)
    assert KeyRun(tiny.PINS.key_prefix, ids).keys() == [tiny.PINS.key(int(i)) for i in ids]
