from __future__ import annotations

import random

#: So many failures in a row are no accident.
_FAILURES = 3
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.1, 3.0


class Breaker:
    """Spares a server that fails, and whoever would wait for it: reads fail at once until a probe succeeds.

    After three failures in a row it opens. After a pause one read goes through as a probe; when that fails too, the
    next pause is twice as long, up to three seconds. Pauses vary by half, so that many clients do not probe together.
    Pure: the caller brings the clock.
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
        """Tell whether a read may go through now; a read that may must be followed by `succeeded` or `failed`.

        Args:
            now_s: the time.
            timeout_s: how long the read may take. A probe of which nothing is heard (its caller hung up) is forgotten
                after it.
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
        if not self.open or now_s < self._probe_at_s:  # reads from before it opened fail late
            return
        if was_open:
            self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)
        self._probe_at_s = now_s + self._pause_s * self._rng.uniform(0.5, 1.5)
        self._probing_until_s = 0.0
