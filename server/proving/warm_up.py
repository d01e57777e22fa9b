"""A version's warm-up: bounded in time, and told of while it lasts and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from kernels.engine import WarmedUp

_log = structlog.get_logger(__name__)

#: Between log lines of one that goes on.
_TELL_S = 5.0


class WarmUp:
    """The warm-up of one version. One thread does it, any may look.

    Attributes:
        runs: that were made.
        of: that it takes; 0 before it began.
        seconds: that it took so far, its rests included.
        cut_off: whether it ended before all of its runs were made.
    """

    def __init__(self, ref: str, s_max: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember.

        Args:
            ref: model@version.
            s_max: seconds after which no further shape is begun.
            clock: of these seconds.
        """
        self.runs = self.of = 0
        self.seconds = 0.0
        self.cut_off = False
        self._ref, self._s_max, self._clock = ref, s_max, clock
        self._began_s = self._told_s = 0.0

    def __str__(self) -> str:
        return f"{self.runs} of {self.of} runs"

    def progress(self, runs: int, of: int) -> bool:
        """Note how far it is; return whether there is time for another shape."""
        now_s = self._clock()
        if runs == 0:
            self._began_s = self._told_s = now_s
            _log.info("warm_up_started", model=self._ref, runs=of, seconds_max=self._s_max)
        self.runs, self.of, self.seconds = runs, of, now_s - self._began_s
        if now_s - self._told_s >= _TELL_S:
            self._told_s = now_s
            _log.info("warm_up_goes_on", model=self._ref, runs=runs, of=of, seconds=round(self.seconds, 1))
        return self.seconds < self._s_max

    def ended(self, done: WarmedUp) -> str:
        """Note what became of it, and return that for people."""
        self.runs, self.of, self.cut_off = done.runs, done.of, done.runs < done.of
        seconds = round(self.seconds, 3)
        if not self.cut_off:
            _log.info("warm_up_done", model=self._ref, runs=done.runs, seconds=seconds)
            return f"warm-up: complete in {seconds:g} s"
        left = done.of - done.runs
        _log.warning("warm_up_cut_off", model=self._ref, runs=done.runs, left=left, seconds=seconds)
        return (
            f"warm-up: cut off after {seconds:g} s (swap.warm_up_s_max), {self}; the first request of each shape that "
            "is left takes longer"
        )
