from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gpu.device_rows import DeviceRows, quantised

DIM, LANES, LANE_ROWS = 4, 3, 64
PINS = np.random.default_rng(1).normal(size=(400, DIM)).astype(np.float32)


class Run:
    """One lane's batch on a device whose copies come early or late."""

    def __init__(self, held, table, lane, pins, early):
        self.held, self.table, self.rows, self.early = held, table, PINS[pins], early
        self.taken = held.take(self.rows, lane)
        if early:
            self._write()

    def _write(self):
        self.table[self.taken.targets] = self.rows[self.taken.missed]

    def end(self, *, fails=False):
        if not fails:
            if not self.early:
                self._write()
            np.testing.assert_array_equal(self.table[self.taken.places], self.rows)
        self.held.give(self.taken, written=not fails)


def table_of(held):
    return np.full((held.size, DIM), np.nan, np.float32)


@pytest.mark.parametrize("size", [8, 64, 1024])
@settings(deadline=None)
@given(st.data())
def test_every_run_reads_its_own_rows_whatever_others_do_meanwhile(size, data):
    held = DeviceRows(size, DIM, LANES, LANE_ROWS)
    table, running = table_of(held), {}
    for _ in range(data.draw(st.integers(1, 25))):
        lane = data.draw(st.integers(0, LANES - 1))
        if lane in running:
            running.pop(lane).end(fails=data.draw(st.booleans()) and data.draw(st.booleans()))
        else:
            pins = data.draw(st.lists(st.integers(0, len(PINS) - 1), min_size=1, max_size=LANE_ROWS))
            running[lane] = Run(held, table, lane, pins, data.draw(st.booleans()))
    for run in running.values():
        run.end()


def test_what_was_brought_once_is_not_sent_again():
    held = DeviceRows(1024, DIM, 1, LANE_ROWS)
    table = table_of(held)
    Run(held, table, 0, range(50), early=False).end()
    again = Run(held, table, 0, [*range(25, 60), 30, 59], early=False)
    assert sorted(again.taken.missed.tolist()) == list(range(25, 35)), "new ones, each once"
    again.end()
    assert (held.hits, held.misses) == (26, 61)


def test_a_row_is_found_by_others_only_when_its_run_has_ended():
    held = DeviceRows(1024, DIM, 2, LANE_ROWS)
    table = table_of(held)
    first = Run(held, table, 0, range(10), early=False)
    second = Run(held, table, 1, range(10), early=False)
    assert len(second.taken.missed) == 10
    assert not set(first.taken.targets) & set(second.taken.targets)
    first.end()
    second.end()
    assert not len(held.take(PINS[:10], 0).missed)


def test_what_a_failed_run_brought_is_not_there():
    held = DeviceRows(1024, DIM, 1, LANE_ROWS)
    table = table_of(held)
    Run(held, table, 0, range(10), early=False).end(fails=True)
    assert len(held.take(PINS[:10], 0).missed) == 10


def test_the_row_that_was_read_longest_ago_gives_way():
    held = DeviceRows(8, DIM, 1, LANE_ROWS)  # one set
    table = table_of(held)
    for pins in (range(4), range(4, 8), range(4), range(8, 12)):
        Run(held, table, 0, pins, early=True).end()
    taken = held.take(PINS[:12], 0)
    assert sorted(taken.missed.tolist()) == [4, 5, 6, 7]


def test_a_changed_row_is_another_row():
    held = DeviceRows(64, 2, 1, 8)
    one = np.array([[1.0, 2.0]], np.float32)
    held.give(held.take(one, 0), written=True)
    for other in ([[1.0, 2.0000002]], [[2.0, 1.0]], [[-1.0, 2.0]], [[1.0, 0.0]], [[0.0, 0.0]]):
        assert len(held.take(np.array(other, np.float32), 0).missed) == 1
    assert not len(held.take(one, 0).missed)


def test_threads_share_one_table():
    held = DeviceRows(256, DIM, LANES, LANE_ROWS)
    table, wrong = table_of(held), []

    def work(lane):
        rng = np.random.default_rng(lane)
        for turn in range(300):
            try:
                Run(held, table, lane, rng.integers(0, 120, LANE_ROWS), early=turn % 2 == 0).end()
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_quantised_number_is_wrong_by_half_a_step_of_its_own_row_at_most():
    rows = np.concatenate([PINS, 1e-3 * PINS, np.zeros((1, DIM), np.float32), np.eye(1, DIM, dtype=np.float32)])
    numbers, scales = quantised(rows)
    assert (numbers.dtype, scales.dtype) == (np.int8, np.float32)
    steps = np.abs(rows).max(axis=1) / 127
    assert (np.abs(numbers * scales[:, None] - rows) <= (0.5 + 1e-4) * steps[:, None]).all()
    assert not numbers[-2].any()
    assert (quantised(np.empty((0, DIM), np.float32))[0].shape, numbers[-1].tolist()) == ((0, DIM), [127, 0, 0, 0])
