"""A circuit breaker: decides when a failing Redis server is left alone, and when it is tried again. Pure."""

from __future__ import annotations

import random

#: The number of failures in a row that opens the breaker.
_FAILURES = 3
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.1, 3.0


class Breaker:
    """A circuit breaker: while a server keeps failing, reads fail immediately instead of waiting for it.

    It opens after three failures in a row. After a pause, it lets one read through as a probe. If the probe fails, the
    next pause is twice as long, up to three seconds; if it succeeds, the breaker closes. Pauses vary at random by half
    so that many clients do not probe at the same time. The breaker is pure: the caller provides the time.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._failures = 0
        self._pause_s = _PAUSE_FIRST_S
        self._probe_at_s = 0.0
        self._probing_until_s = 0.0

    @property
    def open(self) -> bool:
        return self._failures >= _FAILURES

    def allows(self, now_s: float, timeout_s: float) -> bool:
        """Return whether a read may be sent now. If so, the caller must report `succeeded` or `failed`.

        Args:
            now_s: the time.
            timeout_s: how long the read may take. A probe that is not reported within this time, because its caller
                was cancelled, is forgotten.
        """
        if not self.open:
            return True
        if now_s < max(self._probe_at_s, self._probing_until_s):
            return False
        self._probing_until_s = now_s + timeout_s
        return True

    def succeeded(self) -> None:
        self._failures, self._pause_s = 0, _PAUSE_FIRST_S
        self._probe_at_s = self._probing_until_s = 0.0

    def failed(self, now_s: float) -> None:
        was_open = self.open
        self._failures += 1
        if not self.open or now_s < self._probe_at_s:  # late failures of reads that were sent before it opened
            return
        if was_open:
            self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
        self._probe_at_s = now_s + self._pause_s * self._rng.uniform(0.5, 1.5)
        self._probing_until_s = 0.0
