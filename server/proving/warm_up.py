"""Tracks, limits and logs the warm-up of a new model version."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from kernels.engine import WarmedUp

_log = structlog.get_logger(__name__)

#: Interval of progress log lines.
_LOG_INTERVAL_S = 5.0


class WarmUp:
    """The warm-up of one version. One thread updates it; any thread may read it.

    Attributes:
        runs: runs done so far.
        of: runs that a whole warm-up takes; 0 before it starts.
        seconds: its duration so far, pauses included.
        cut_off: whether it ended before all runs were done.
    """

    def __init__(self, ref: str, s_max: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Store the settings; the first call of `progress` starts the clock.

        Args:
            ref: model@version.
            s_max: seconds after which no further shape is warmed up.
            clock: seconds, monotonic.
        """
        self.runs = self.of = 0
        self.seconds = 0.0
        self.cut_off = False
        self._ref, self._s_max, self._clock = ref, s_max, clock
        self._began_s = self._logged_s = 0.0

    def __str__(self) -> str:
        return f"{self.runs} of {self.of} runs"

    def progress(self, runs: int, of: int) -> bool:
        """Record the progress; return whether there is time for another shape."""
        now_s = self._clock()
        if runs == 0:
            self._began_s = self._logged_s = now_s
            _log.info("warm_up_started", model=self._ref, runs=of, seconds_max=self._s_max)
        self.runs, self.of, self.seconds = runs, of, now_s - self._began_s
        if now_s - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = now_s
            _log.info("warm_up_goes_on", model=self._ref, runs=runs, of=of, seconds=round(self.seconds, 1))
        return self.seconds < self._s_max

    def ended(self, done: WarmedUp) -> str:
        """Record and log the end; return it as a sentence for operators."""
        self.runs, self.of, self.cut_off = done.runs, done.of, done.runs < done.of
        seconds = round(self.seconds, 3)
        if not self.cut_off:
            _log.info("warm_up_done", model=self._ref, runs=done.runs, seconds=seconds)
            return f"warm-up: complete in {seconds:g} s"
        left = done.of - done.runs
        _log.warning("warm_up_cut_off", model=self._ref, runs=done.runs, left=left, seconds=seconds)
        return (
            f"warm-up: cut off after {seconds:g} s (swap.warm_up_s_max), {self}; the first request of each remaining "
            "shape takes longer"
        )
