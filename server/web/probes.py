"""What one server process says of itself: whether it lives, has started, and answers Rank calls.

- `/livez`: would a restart help? It answers 503 if the event loop makes no turns.
- `/startupz`: has the start ended? Until then, liveness and readiness say little.
- `/readyz`: shall Rank calls come here? `/healthz` says the same, and lists the state of background work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.web.http_port import Answer
from server.web.pages import Verdict, probe

#: How often the event loop shows that it makes turns.
_BEAT_S = 0.25


@dataclass(slots=True)
class ProcessState:
    """The state that probes report. The event loop writes it, other threads may read it.

    Attributes:
        started: whether the models have been loaded and the gRPC port has been open.
        serving: whether Rank calls are answered.
        outage: why the feature store cannot be read; empty if it can.
        turned_s: when the event loop last made a turn, on the monotonic clock.
    """

    started: bool = False
    serving: bool = False
    outage: str = ""
    turned_s: float = field(default_factory=time.monotonic)

    def ready(self, *, without_features: bool) -> bool:
        """Return whether Rank calls shall come here, also without features if the setting says so."""
        return self.serving and (without_features or not self.outage)


class Heartbeat:
    """Notes regularly that the running event loop makes turns, until `close`."""

    def __init__(self, state: ProcessState) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle
        self._beat()

    def _beat(self) -> None:
        self._state.turned_s = time.monotonic()
        self._next = self._loop.call_later(_BEAT_S, self._beat)

    def close(self) -> None:
        self._next.cancel()


class Probes:
    """Judges one process. Any thread may call it."""

    def __init__(
        self,
        state: ProcessState,
        progress: Callable[[], Sequence[str]],
        details: Callable[[], Sequence[str]],
        *,
        without_features: bool,
        silence_s_max: float,
    ) -> None:
        """Create the probes.

        Args:
            state: what they report.
            progress: returns lines that say how far the start is.
            details: returns the lines that `/healthz` shows after its first line.
            without_features: whether the process is ready while the feature store cannot be read.
            silence_s_max: time without a turn of the event loop after which the process does not live.
        """
        self._state = state
        self._progress = progress
        self._details = details
        self._without_features = without_features
        self._silence_s_max = silence_s_max

    def pages(self) -> Mapping[str, Answer]:
        """Return the pages by their paths."""
        judges = {"/livez": self.live, "/readyz": self.ready, "/startupz": self.startup, "/healthz": self.health}
        return {path: probe(judge) for path, judge in judges.items()}

    def live(self) -> Verdict:
        silence_s = time.monotonic() - self._state.turned_s
        if silence_s <= self._silence_s_max:
            return Verdict(good=True, lines=("alive",))
        why = f"event loop: no turn for {silence_s:.1f} s, at most {self._silence_s_max:g} s are usual"
        return Verdict(good=False, lines=("not alive", why))

    def startup(self) -> Verdict:
        if self._state.started:
            return Verdict(good=True, lines=("started",))
        return Verdict(good=False, lines=("starting", *self._progress()))

    def ready(self) -> Verdict:
        return self._readiness("ready", "not ready", () if self._state.started else ("starting", *self._progress()))

    def health(self) -> Verdict:
        return self._readiness("serving", "not serving", self._details())

    def _readiness(self, yes: str, no: str, details: Sequence[str]) -> Verdict:
        state = self._state
        good = state.ready(without_features=self._without_features)
        reasons = []
        if state.started and not state.serving:
            reasons.append("draining")
        if state.outage:
            reasons.append(f"feature store: {state.outage}; answers are degraded")
        return Verdict(good, (yes if good else no, *reasons, *details))
