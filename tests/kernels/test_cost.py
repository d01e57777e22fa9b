"""What a warm-up runs, and that its measure of a run's cost is not that of a first run."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from kernels import cost
from kernels.engine import EngineError, WarmedUp
from tests.kernels.test_engines import batch

STREAMS, SHAPES = 3, ((4, 512), (2, 64), (1, 16))
#: Each size: every stream once, and twice more; and eight times on all streams at once.
MEASURED = 4 * (STREAMS + 2) + 8


class Device:
    """Streams that take turns; a shape's first run on each takes a second longer than 1 ms and 10 us a row."""

    def __init__(self):
        self.now_s, self.turn, self.runs, self.known = 0.0, 0, [], set()

    def run(self, tiled):
        shape = (tiled.requests, tiled.rows)
        self.runs.append(shape)
        first = (self.turn, shape) not in self.known
        self.known.add((self.turn, shape))
        self.turn = (self.turn + 1) % STREAMS
        self.now_s += first + 1e-3 + 1e-5 * tiled.rows
        return np.empty(0)


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: made.now_s))
    return made


def test_every_shape_runs_on_every_stream_in_the_order_given(device):
    done, found = cost.warm_and_measure(device.run, STREAMS, batch(5), shapes=SHAPES)
    assert device.runs[: 3 * STREAMS] == [shape for shape in SHAPES for _ in range(STREAMS)]
    assert done == WarmedUp(3 * STREAMS + MEASURED, 3 * STREAMS + MEASURED)
    assert (found.fixed_s, found.per_row_s) == (pytest.approx(1e-3), pytest.approx(1e-5))


@pytest.mark.parametrize(("runs_in_time", "made"), [(0, 0), (1, 1), (3, 3), (4, 4), (9, 9), (100, 9)])
def test_shapes_that_there_is_no_time_for_are_left_out_and_the_cost_is_no_first_runs(device, runs_in_time, made):
    done, found = cost.warm_and_measure(device.run, STREAMS, batch(5), lambda runs, of: runs < runs_in_time, SHAPES)
    assert done == WarmedUp(made + MEASURED, 9 + MEASURED)
    assert (found.fixed_s, found.per_row_s) == (pytest.approx(1e-3), pytest.approx(1e-5))


def test_the_slowdown_is_how_much_longer_runs_take_while_all_streams_run(monkeypatch):
    clock = threading.local()  # each thread counts the seconds of its own runs

    def run(_):
        alone = threading.current_thread() is threading.main_thread()
        clock.now_s = getattr(clock, "now_s", 0.0) + (1.0 if alone else 1.5)

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: getattr(clock, "now_s", 0.0)))
    assert cost.warm_and_measure(run, 2, batch(5))[1].slowdown == 1.5
    assert cost.warm_and_measure(run, 1, batch(5))[1].slowdown == 1.0


def test_an_error_of_a_run_beside_others_is_raised():
    runs = itertools.count()

    def run(_):
        if next(runs) >= 16:
            raise EngineError("told to fail")

    with pytest.raises(EngineError, match="told to fail"):
        cost.warm_and_measure(run, 2, batch(5))
