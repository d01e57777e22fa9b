"""Every status fits into gRPC's trailers, and says what it leaves out."""

from __future__ import annotations

import base64
import urllib.parse

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from server.api.status import listed, status_of, within
from server.errors import FieldViolation, InvalidRequestError, OverloadedError, StatusError, StoreDownError

#: gRPC's default soft limit is 8 KiB for all metadata, where each entry counts 32 bytes more.
TRAILERS_BYTES_MAX = 8_192


def trailers_bytes(error):
    """Return what a status takes on its way: the message percent-encoded, binary details as base64."""
    _, message, trailers = status_of(error)
    sent = [("grpc-status", "13"), ("grpc-message", urllib.parse.quote(message, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}"))]
    sent += [(k, v if isinstance(v, str) else base64.b64encode(v).decode()) for k, v in trailers]
    return sum(len(key) + len(value) + 32 for key, value in sent)


def details(error):
    _, _, trailers = status_of(error)
    status = status_pb2.Status.FromString(dict(trailers)["grpc-status-details-bin"])
    found = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(found)
    return status, [(v.field, v.description) for v in found.field_violations]


LONG = st.text(max_size=50) | st.text(alphabet="é%\x00😀x", max_size=30).map(lambda text: text * 1_000)


@given(st.lists(st.builds(FieldViolation, LONG, LONG), min_size=1, max_size=40), st.integers(0, 10**6))
def test_no_list_of_violations_is_too_long_for_trailers(violations, more):
    error = InvalidRequestError(violations, more)
    assert trailers_bytes(error) < TRAILERS_BYTES_MAX
    status, shown = details(error)
    assert status.message == status_of(error)[1]
    count = len(violations) + more
    if shown[-1] != ("", f"{count - len(shown) + 1} more problems are not listed"):
        assert len(shown) == count


@given(LONG, st.floats(min_value=0))
def test_no_message_is_too_long_for_trailers(text, retry_s):
    for error in (StoreDownError(text), OverloadedError(text, retry_s), StatusError(grpc.StatusCode.ABORTED, text)):
        assert trailers_bytes(error) < TRAILERS_BYTES_MAX


def test_what_is_left_out_is_counted():
    many = InvalidRequestError([FieldViolation(f"pin_ids[{i}]", "x" * 400) for i in range(10)], more=90)
    _, shown = details(many)
    assert [field for field, _ in shown] == ["pin_ids[0]", "pin_ids[1]", "pin_ids[2]", "pin_ids[3]", ""]
    assert shown[-1][1] == "96 more problems are not listed"
    assert status_of(many)[1].endswith("; 98 more problems are not listed")


def test_short_violations_are_told_as_they_are():
    error = InvalidRequestError([FieldViolation("surface", "unknown"), FieldViolation("pin_ids", "none")])
    assert status_of(error)[1] == "surface: unknown; pin_ids: none"
    assert details(error)[1] == [("surface", "unknown"), ("pin_ids", "none")]


def test_names_are_listed_as_far_as_there_is_room():
    assert listed(["save", "hide"]) == "save, hide"
    assert listed(range(1, 4)) == "1, 2, 3"
    many = listed(f"action-{i:02}" for i in range(40))
    assert many.startswith("action-00, action-01, ")
    assert many.endswith(", and 22 more")


@pytest.mark.parametrize("text", ["x" * 3_000, "%" * 3_000, "é" * 3_000, "😀" * 3_000])
def test_a_long_text_says_how_long_it_was(text):
    cut = within(text, 1_000)
    assert cut.endswith("... (3000 characters)")
    assert cut.startswith(text[:50])


def test_a_text_of_broken_characters_is_sent_all_the_same():
    assert within("models/\udcff", 100) == "models/?"


@pytest.mark.parametrize(
    ("remaining_s", "pushback"),
    [(None, "250"), (10.0, "250"), (0.26, "250"), (0.25, "-1"), (0.0, "-1")],
)
def test_a_client_is_never_told_to_come_back_after_its_deadline(remaining_s, pushback):
    trailers = dict(status_of(OverloadedError("full", 0.25), remaining_s)[2])
    assert trailers["grpc-retry-pushback-ms"] == pushback
