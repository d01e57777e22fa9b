from __future__ import annotations

import math

import pytest

from server.scheduling.splitting import (
    is_large,
    large_piece_rows,
    part_rows,
    rows_a_stream,
    splitting_pays,
)
from tests.server.scheduling.straight_cost import StraightCost

ONLY_ROWS = StraightCost(per_row_s=1 / 128)


@pytest.mark.parametrize(
    ("rows", "typical", "large"),
    [
        pytest.param(256, 128.0, False, id="twice a typical one is not large"),
        pytest.param(257, 128.0, True, id="more is"),
        pytest.param(1 << 30, math.inf, False, id="no other lane at work"),
        pytest.param(1 << 30, math.nan, False, id="no ticket yet"),
    ],
)
def test_what_is_large(rows, typical, large):
    assert is_large(rows, typical) is large


@pytest.mark.parametrize(
    ("rows", "streams", "expected"),
    [
        pytest.param(12, 4, 3, id="evenly"),
        pytest.param(10, 4, 3, id="rounded up"),
        pytest.param(10, 1, 10, id="on the only stream"),
        pytest.param(10, -3, 10, id="others need every stream"),
    ],
)
def test_rows_of_a_ticket_on_each_stream(rows, streams, expected):
    assert rows_a_stream(rows, streams) == expected


@pytest.mark.parametrize(
    ("rows", "typical", "expected"),
    [
        pytest.param(1000, 64.0, 32, id="half of a typical ticket of the others"),
        pytest.param(1000, 65.0, 33, id="rounded up"),
        pytest.param(20, 64.0, 20, id="what is left"),
        pytest.param(32, 64.0, 32, id="exactly one piece"),
        pytest.param(33, 64.0, 17, id="the last two pieces alike, rounded up"),
        pytest.param(63, 64.0, 32, id="the last two pieces alike"),
        pytest.param(64, 64.0, 32, id="two whole pieces"),
        pytest.param(80, 64.0, 32, id="three pieces"),
        pytest.param(1000, 1.0, 1, id="rows alone cost nothing more in small runs"),
    ],
)
def test_a_piece_of_a_large_ticket(rows, typical, expected):
    assert large_piece_rows(rows, typical, ONLY_ROWS) == expected


def test_a_piece_of_a_large_ticket_is_large_enough_for_what_each_run_costs():
    # 0.75 s of a run's 5 s.
    assert large_piece_rows(100_000, 64.0, StraightCost(fixed_s=0.5, per_request_s=0.25, per_row_s=0.01)) == 425
    # Also the part of it that each request costs.
    assert large_piece_rows(1000, 1.0, StraightCost(per_request_s=0.75, per_row_s=1.0)) == 5
    # Rows cost nothing: the largest size.
    assert large_piece_rows(10_000_000, 64.0, StraightCost(fixed_s=1.0)) == 1 << 20


@pytest.mark.parametrize(
    ("rows", "usable", "needed", "next_free_s", "expected"),
    [
        pytest.param(200, 4, 0, None, 50, id="over the idle streams"),
        pytest.param(201, 4, 0, None, 51, id="rounded up"),
        pytest.param(200, 4, 2, None, 100, id="without those that others need"),
        pytest.param(200, 3, 2, None, 200, id="others need all but one"),
        pytest.param(200, 1, 0, None, 200, id="one idle stream"),
        pytest.param(200, 1, 1, None, 200, id="the one idle stream is needed"),
        pytest.param(200, 0, 0, 0.0, 200, id="no stream that it may take"),
        pytest.param(100, 1, 0, 0.0, 50, id="the other stream is free now"),
        pytest.param(101, 1, 0, 0.0, 51, id="the other stream is free now, rounded up"),
        pytest.param(100, 1, 0, 20 / 128, 60, id="the other stream has 20 rows to go"),
        pytest.param(3, 1, 0, 1 / 128, 2, id="one row to go"),
        pytest.param(3, 1, 0, 1.5 / 128, 3, id="one and a half rows to go"),
        pytest.param(100, 1, 0, 9.0, 100, id="the other stream ends after this ticket"),
        pytest.param(1, 1, 0, 0.0, 1, id="one row cannot be split"),
    ],
)
def test_parts_of_a_ticket_end_together(rows, usable, needed, next_free_s, expected):
    cost = StraightCost(fixed_s=0.5, per_request_s=0.25, per_row_s=1 / 128)
    assert part_rows(rows, usable, needed, next_free_s, cost) == expected


def test_a_ticket_whose_rows_cost_nothing_is_not_split():
    assert part_rows(100, 1, 0, 0.0, StraightCost(fixed_s=1.0)) == 100


@pytest.mark.parametrize(
    ("run_s", "load", "pays"),
    [
        pytest.param(0.125, 1.9, True, id="the answer gains more than a loaded engine loses"),
        pytest.param(0.125, 2.0, False, id="no more than a loaded engine loses"),
        pytest.param(2.0, 0.0, True, id="on an idle engine a second of a stream is worth a tenth"),
        pytest.param(3.0, 0.0, False, id="but not nothing"),
    ],
)
def test_splitting_pays_where_the_answer_gains_more_than_the_streams_lose(run_s, load, pays):
    # 64 rows in halves: the answer comes 0.25 s sooner, and the streams lose one more run's fixed cost.
    assert splitting_pays(64, 32, load, StraightCost(per_request_s=run_s, per_row_s=1 / 128)) is pays


@pytest.mark.parametrize(
    ("part", "slowdown", "pays"),
    [
        pytest.param(32, 1.0, True, id="halves: 0.25 s sooner, for 1 s of streams"),
        pytest.param(32, 1.05, True, id="halves that slow each other down a little"),
        pytest.param(32, 1.2, False, id="halves that slow each other down take nearly as long as the whole"),
        pytest.param(16, 1.0, True, id="quarters: 0.375 s sooner, for 3 s"),
        pytest.param(4, 1.0, False, id="sixteen parts: 0.47 s sooner, for 15 s"),
    ],
)
def test_splitting_pays_only_as_far_as_parts_are_faster_than_the_whole_alone(part, slowdown, pays):
    cost = StraightCost(per_request_s=1.0, per_row_s=1 / 128, slowdown=slowdown)
    assert splitting_pays(64, part, 0.0, cost) is pays
