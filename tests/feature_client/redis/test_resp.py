"""The bounded reader of Redis replies beside a slow one that is obviously right."""

from __future__ import annotations

import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feature_client.stores.redis.resp import Bounds, Incomplete, MalformedReplyError, ReplyReader

#: In CI; `PINRANK_FUZZ_CASES=20000` for a long look.
CASES = int(os.environ.get("PINRANK_FUZZ_CASES", "300"))
SMALL = Bounds(size_bytes=1 << 20, elements=40, depth=3, line_bytes=40)


class ToldError(Exception):
    """An error reply; equal to another of the same text."""

    def __eq__(self, other):
        return isinstance(other, ToldError) and self.args == other.args

    def __hash__(self):
        return hash(self.args)


class SlowReader:
    """Reads all at once, one byte range after the other, by recursion."""

    def __init__(self, content: bytes, bounds: Bounds) -> None:
        self.content, self.at, self.bounds = content, 0, bounds
        self.elements = 0

    def line(self) -> bytes:
        end = self.content.find(b"\r\n", self.at)
        if end < 0 or end + 2 - self.at > self.bounds.line_bytes:
            if len(self.content) - self.at >= self.bounds.line_bytes:
                raise MalformedReplyError
            raise EOFError
        line, self.at = self.content[self.at : end], end + 2
        return line

    def number(self, digits: bytes) -> int:
        if digits.lstrip(b"-").isdigit() and digits.count(b"-") <= 1 and len(digits.lstrip(b"-")) < 20:
            number = int(digits)
            if -(2**63) <= number < 2**63:
                return number
        raise MalformedReplyError

    def length(self, digits: bytes) -> int:
        if (length := self.number(digits)) >= -1:
            return length
        raise MalformedReplyError

    def reply(self, depth: int = 0):
        line = self.line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode("ascii", "replace")
        if kind == b"-":
            return ToldError(rest.decode("ascii", "replace"))
        if kind == b":":
            return self.number(rest)
        if kind == b"$":
            if (length := self.length(rest)) == -1:
                return None
            if self.at + length > self.bounds.size_bytes:
                raise MalformedReplyError
            value = self.content[self.at : self.at + length]
            end = self.content[self.at + length : self.at + length + 2]
            if len(end) < 2:
                raise EOFError
            if end != b"\r\n":
                raise MalformedReplyError
            self.at += length + 2
            return value
        if kind == b"*":
            if (length := self.length(rest)) < 1:
                return [] if length == 0 else None
            self.elements += length
            if self.elements > self.bounds.elements or depth == self.bounds.depth:
                raise MalformedReplyError
            return [self.reply(depth + 1) for _ in range(length)]
        raise MalformedReplyError


def read_slowly(content: bytes, bounds: Bounds):
    """All replies, and how it ended."""
    reader, found = SlowReader(content, bounds), []
    while True:
        whole, reader.elements = reader.at, 0
        try:
            found.append(reader.reply())
        except EOFError:
            return found, "more" if whole < len(content) else "end"
        except MalformedReplyError:
            return found, "malformed"


def read_in_pieces(content: bytes, cuts: list[int], bounds: Bounds):
    reader, found = ReplyReader(ToldError, bounds), []
    stops = sorted({min(cut, len(content)) for cut in cuts} | {len(content)})
    try:
        for start, stop in zip([0, *stops[:-1]], stops, strict=True):
            reader.feed(content[start:stop])
            while (reply := reader.take()) is not Incomplete.INCOMPLETE:
                found.append(reply)
    except MalformedReplyError:
        return found, "malformed"
    return found, "more" if reader.pending else "end"


def written(reply) -> bytes:
    """As a server writes it."""
    match reply:
        case None:
            return b"$-1\r\n"
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case int():
            return b":%d\r\n" % reply
        case str():
            return b"+%b\r\n" % reply.encode()
        case ToldError():
            return b"-%b\r\n" % str(reply).encode()
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(written, reply))
    raise AssertionError(reply)


words = st.text(st.characters(codec="ascii", exclude_characters="\r\n"), max_size=20)
#: Many of one length, and some that look like replies themselves.
values = (
    st.binary(max_size=8)
    | st.binary(min_size=6, max_size=6)
    | st.sampled_from([b"\r\n*9\r\n", b"$6\r\nab", b"\r\n$6\r\n"])
)
leaves = st.none() | values | st.integers(-(2**63), 2**63 - 1) | words | words.map(ToldError)
replies = st.recursive(leaves, lambda inner: st.lists(inner, max_size=12), max_leaves=30)
cuts = st.lists(st.integers(0, 400), max_size=12)
ROOMY = Bounds(depth=40)


@settings(max_examples=CASES, deadline=None)
@given(st.lists(replies, max_size=4), cuts)
def test_what_a_server_writes_is_read_whatever_the_pieces_it_comes_in(sent, cuts):
    content = b"".join(map(written, sent))
    assert read_in_pieces(content, cuts, ROOMY) == (sent, "end")
    assert read_slowly(content, ROOMY) == (sent, "end")


@st.composite
def damaged(draw):
    content = bytearray(b"".join(map(written, draw(st.lists(replies, min_size=1, max_size=3)))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["replace", "insert", "cut", "drop"])):
            case "replace":
                content[at : at + 1] = draw(
                    st.sampled_from([b"*", b"$", b":", b"9", b"-", b"\r", b"\n", b"%", b"_", b" "])
                )
            case "insert":
                content[at:at] = draw(
                    st.sampled_from([b"\r\n", b"*2147483647\r\n", b"$-2\r\n", b"9", b"*-1\r\n", b"+"])
                )
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + 1]
    return bytes(content)


@settings(max_examples=CASES, deadline=None)
@given(damaged() | st.binary(max_size=60), cuts)
@example(b"*2147483647\r\n", [])
@example(b"*1\r\n" * 4 + b":1\r\n", [])
@example(b"*2\r\n$3\r\nabc\r\n$3\r\nabcd\n", [])
def test_damaged_replies_are_read_as_far_as_a_slow_reader_reads_them(content, cuts):
    assert read_in_pieces(content, cuts, SMALL) == read_slowly(content, SMALL)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"*2147483647\r\n", "elements"),
        (b"*999999\r\n" * 2, "elements"),
        (b"*1\r\n" * 9, "deep"),
        (b"$2147483647\r\n", "bytes"),
        (b"$-2\r\n", "length of -2"),
        (b"$+5\r\nhello\r\n", "a number was expected"),
        (b"$1_0\r\n0123456789\r\n", "a number was expected"),
        (b":9223372036854775808\r\n", "a number was expected"),
        (b"$3\r\nabcd\r\n", "length is not the announced one"),
        (b"\r\n", "empty line"),
        (b"+" + b"a" * 9000, "line of more"),
        (b"HTTP/1.1 400 Bad Request\r\n", "unknown type 0x48"),
        (b"%1\r\n+a\r\n+b\r\n", "unknown type 0x25"),
        (b">2\r\n+a\r\n+b\r\n", "unknown type 0x3e"),
    ],
)
def test_what_no_server_sends_is_refused_by_name(content, why):
    reader = ReplyReader(ToldError)
    reader.feed(content)
    with pytest.raises(MalformedReplyError, match=why):
        reader.take()


def test_a_reply_that_never_ends_is_refused_at_its_bound():
    bounds = Bounds(size_bytes=1 << 16)
    reader, fed = ReplyReader(ToldError, bounds), 0
    reader.feed(b"*1000000\r\n")
    with pytest.raises(MalformedReplyError, match="more than 65536 bytes"):  # noqa: PT012 - at which piece, is asked below
        while reader.take() is Incomplete.INCOMPLETE:
            reader.feed(b"$4\r\nabcd\r\n" * 100)
            fed += 1000
    assert bounds.size_bytes <= fed < bounds.size_bytes + 2000


def test_numbers_that_never_end_are_refused_at_the_same_bound():
    bounds = Bounds(size_bytes=1 << 16)
    reader, fed = ReplyReader(ToldError, bounds), 0
    reader.feed(b"*1000000\r\n")
    with pytest.raises(MalformedReplyError, match="more than 65536 bytes"):  # noqa: PT012 - at which piece, is asked below
        while reader.take() is Incomplete.INCOMPLETE:
            reader.feed(b":1\r\n" * 250)
            fed += 1000
    assert bounds.size_bytes <= fed < bounds.size_bytes + 2000


def test_a_reply_may_hold_64_mib_a_million_elements_eight_deep_and_lines_of_8_kib():
    assert Bounds() == Bounds(size_bytes=67_108_864, elements=1_048_576, depth=8, line_bytes=8_192)


@pytest.mark.parametrize(
    ("content", "reply"),
    [
        pytest.param(b"*-1\r\n", None, id="an array that is not there"),
        pytest.param(b"$-01\r\n", None, id="a value that is not there, written at length"),
        pytest.param(b"*0\r\n", [], id="an empty array"),
        pytest.param(b"$0\r\n\r\n", b"", id="an empty value"),
    ],
)
def test_what_is_not_there_is_told_from_what_is_empty(content, reply):
    reader = ReplyReader(ToldError)
    reader.feed(content + b":7\r\n")
    assert (reader.take(), reader.take()) == (reply, 7)
    assert not reader.pending


def test_a_line_at_its_bound_is_refused_and_one_that_just_fits_is_read():
    bounds = Bounds(line_bytes=10)
    reader = ReplyReader(ToldError, bounds)
    reader.feed(b"+1234567\r\n")
    assert reader.take() == "1234567"
    reader.feed(b"+123456789")
    with pytest.raises(MalformedReplyError, match="line of more than 10 bytes"):
        reader.take()


@pytest.mark.parametrize(
    ("bounds", "fits", "too_large"),
    [
        pytest.param(Bounds(elements=2), b"*2\r\n:1\r\n:2\r\n", b"*3\r\n:1\r\n:2\r\n:3\r\n", id="elements"),
        pytest.param(Bounds(size_bytes=7), b"$3\r\nabc\r\n", b"$4\r\nabcd\r\n", id="bytes"),
    ],
)
def test_every_reply_may_be_as_large_as_its_bound_and_no_larger(bounds, fits, too_large):
    for replies_before in range(3):
        reader = ReplyReader(ToldError, bounds)
        reader.feed(fits * (replies_before + 1) + too_large)
        for _ in range(replies_before + 1):
            assert reader.take() is not Incomplete.INCOMPLETE
        with pytest.raises(MalformedReplyError, match="a reply of more than"):
            reader.take()
    fresh = ReplyReader(ToldError, bounds)
    fresh.feed(too_large)
    with pytest.raises(MalformedReplyError, match="a reply of more than"):
        fresh.take()


def test_a_single_byte_is_pending():
    reader = ReplyReader(ToldError)
    assert not reader.pending
    reader.feed(b"+")
    assert reader.pending


def test_a_value_in_a_thousand_pieces_is_joined_once():
    value = os.urandom(1 << 20)
    content, reader = written([value, None]), ReplyReader(ToldError)
    for start in range(0, len(content), 1 << 10):
        assert reader.take() is Incomplete.INCOMPLETE
        reader.feed(content[start : start + (1 << 10)])
    assert reader.take() == [value, None]
    assert not reader.pending
