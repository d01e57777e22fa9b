from __future__ import annotations

import pytest

from server.scheduling.overlap import Overlap


def test_a_run_alone_has_nothing_beside_it():
    overlap = Overlap(streams=2)
    assert overlap.end(overlap.begin(10.0), 12.0) == 0.0


def test_what_ran_beside_a_run_counts_as_a_fraction_of_the_other_streams_time():
    overlap = Overlap(streams=3)
    first = overlap.begin(10.0)
    second = overlap.begin(11.0)
    assert overlap.end(second, 12.0) == 0.5, "one of two other streams all the time"
    third = overlap.begin(13.0)
    assert overlap.end(first, 14.0) == pytest.approx(2.0 / 8.0), "2 s of 4 s on two streams"
    assert overlap.end(third, 15.0) == pytest.approx(1.0 / 4.0)


def test_streams_that_all_run_are_beside_each_other_all_the_time():
    overlap = Overlap(streams=2)
    starts = [overlap.begin(5.0), overlap.begin(5.0)]
    assert [overlap.end(start, 6.0) for start in starts] == [1.0, 1.0]


def test_a_run_that_took_no_time_or_began_after_its_end_has_what_runs_at_its_end_beside_it():
    overlap = Overlap(streams=2)
    other = overlap.begin(5.0)
    assert overlap.end(overlap.begin(6.0), 6.0) == 1.0
    assert overlap.end(overlap.begin(9.0), 7.0) == 1.0
    assert 0.0 <= overlap.end(other, 8.0) <= 1.0


def test_the_only_stream_has_no_other_beside_it():
    overlap = Overlap(streams=1)
    assert overlap.end(overlap.begin(1.0), 2.0) == 0.0
