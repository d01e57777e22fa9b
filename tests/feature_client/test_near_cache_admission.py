"""Which rows a near cache keeps when a set of places is full: those that were asked for more often."""

from __future__ import annotations

import numpy as np
import pytest

from feature_client.near_cache import NearCache
from tests import tiny
from tests.feature_client.cached_rows import cache, ids, implementation, read  # noqa: F401 - the fixture


def ask(near, asked, times=1):
    """Ask so that it is noted so many times: every other lookup is."""
    for _ in range(times):
        near.get(asked, 0.0)
        near.get(asked, 0.0)


def full(asked=2):
    """A cache of one set, full of rows that were asked for so many times each."""
    near = NearCache(tiny.PINS, 1, 10)
    everyone = np.arange(8, dtype=np.uint64)
    near.put(everyone, read(*range(8)), 0.0)
    ask(near, everyone, asked)
    return near


def admitted(near, newcomer, now_s=0.0):
    near.put(ids(newcomer), read(newcomer), now_s)
    return near.get(ids(newcomer), now_s)[1] is None


NEWCOMER, FILLER = 77, 1000
NEWCOMER_OF_64 = 5000


def test_a_look_at_aged_rows_is_no_request():
    near = full(asked=2)
    for _ in range(8):
        near.aged(ids(NEWCOMER), 0.0)
    assert not admitted(near, NEWCOMER)


@pytest.mark.parametrize(("times", "welcome"), [(2, False), (3, True)])
def test_a_newcomer_takes_a_place_only_when_it_was_asked_for_more_often(times, welcome):
    near = full(asked=2)
    ask(near, ids(NEWCOMER), times)
    assert admitted(near, NEWCOMER) is welcome
    assert near.counts.evictions == welcome


def test_the_row_asked_for_least_gives_way():
    near = full(asked=1)
    ask(near, ids(0, 1, 2, 4, 5, 6, 7))
    ask(near, ids(NEWCOMER), 2)
    assert admitted(near, NEWCOMER)
    assert near.get(ids(*range(8)), 0.0)[1].tolist() == [False] * 3 + [True] + [False] * 4


def test_a_row_gives_way_at_once_when_it_is_too_old_and_not_before():
    near = full(asked=2)
    assert not admitted(near, NEWCOMER, 10.0)
    assert admitted(near, NEWCOMER, 10.1)


def test_a_row_that_is_read_again_is_welcome_whatever_it_was_asked_for():
    near = full(asked=0)
    ask(near, ids(*range(7)), 3)
    near.put(ids(7), read(9), 5.0)
    rows, absent = near.get(ids(7), 14.0)
    assert absent is None
    assert rows.rows.tobytes() == tiny.pin_rows(ids(9)).tobytes()
    assert near.counts.evictions == 0


@pytest.mark.parametrize(
    ("notes", "welcome"),
    [
        pytest.param(48 * 8, True, id="48 notes a place"),
        pytest.param(48 * 8 + 1, False, id="one more: all counts are halved"),
    ],
)
def test_counts_are_halved_after_48_notes_a_place(notes, welcome):
    near = full(asked=2)
    ask(near, ids(NEWCOMER), 3)  # against two; after halving, one against one
    ask(near, np.full(notes - 16 - 3, FILLER, np.uint64))
    assert admitted(near, NEWCOMER) is welcome


@pytest.mark.parametrize(("notes", "welcome"), [(48 * 8, True), (48 * 8 + 1, False)])
def test_half_of_the_notes_stay_when_counts_are_halved(notes, welcome):
    near = full(asked=2)
    ask(near, np.full(48 * 8 + 1 - 16, FILLER, np.uint64))  # halved: one each, and 192 notes
    ask(near, np.arange(8, dtype=np.uint64))
    ask(near, ids(NEWCOMER), 3)
    ask(near, np.full(notes - 192 - 8 - 3, FILLER, np.uint64))
    assert admitted(near, NEWCOMER) is welcome


def test_who_was_never_asked_for_is_not_taken_for_others_that_were():
    # Thirty ids on all 128 counters; on half of them a fifth of the newcomers would be welcome.
    for newcomer in range(1000, 1060):
        near = full(asked=2)
        ask(near, np.arange(100, 130, dtype=np.uint64), 5)
        assert not admitted(near, newcomer)


def test_a_count_that_is_halved_keeps_its_half():
    near = full(asked=1)
    ask(near, ids(NEWCOMER), 2)
    ask(near, np.full(48 * 8 + 1 - 8 - 2, FILLER, np.uint64))  # halved: none against one
    assert admitted(near, NEWCOMER)


@pytest.mark.parametrize(("lookups", "welcome"), [(1, False), (2, True)])
def test_the_second_of_two_lookups_is_noted(lookups, welcome):
    near = full(asked=0)
    for _ in range(lookups):
        near.get(ids(NEWCOMER), 0.0)
    assert admitted(near, NEWCOMER) is welcome


def test_255_requests_count_for_more_than_254():
    near, everyone = cache(kilobytes=4), np.arange(1000, dtype=np.uint64)
    near.put(everyone, read(*everyone.tolist()), 0.0)
    stored = everyone[~near.get(everyone, 0.0)[1]]
    assert len(stored) == near.places == 64

    def has_room_without(row):
        others = cache(kilobytes=4)
        rest = stored[stored != row]
        others.put(rest, read(*rest.tolist()), 0.0)
        return admitted(others, NEWCOMER_OF_64)

    rivals = np.array([row for row in stored if has_room_without(row)], np.uint64)
    assert len(rivals) == 8, "all rows of the newcomer's set"
    ask(near, rivals, 254)
    ask(near, ids(NEWCOMER_OF_64), 254)
    assert not admitted(near, NEWCOMER_OF_64)
    ask(near, ids(NEWCOMER_OF_64))
    assert admitted(near, NEWCOMER_OF_64)


def test_a_count_stays_at_255():
    near = full(asked=1)
    ask(near, ids(NEWCOMER), 256)
    assert admitted(near, NEWCOMER)
