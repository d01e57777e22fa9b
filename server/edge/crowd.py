"""How many connections there may be, and which one goes when there are too many."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from server.access.token_bucket import TokenBucket

if TYPE_CHECKING:
    from server.telemetry.metrics import ConnectionMetrics

#: Descriptors that are left to stores, the HTTP port, files and pipes.
_DESCRIPTORS_KEPT = 128
_CONNECTIONS_MIN = 16
#: A connection may end so many unanswered calls at once, and so many a second: as many as may be in flight on it when
#: their common deadline passes, and more than a client that works gives up.
_RESETS_AT_ONCE, _RESETS_PER_S = 2_000, 100.0
#: A connection may have so many calls at once, and so many a second, that no quota bounds: refused ones, of health and
#: of reflection. Beyond that, its calls wait.
_FREE_CALLS_AT_ONCE, _FREE_CALLS_PER_S = 200, 100.0


class Closable(Protocol):
    """A connection."""

    def abort(self) -> None:
        """Close it at once."""


def resets(now_s: float) -> TokenBucket:
    """Return what counts a connection's calls that end unanswered."""
    return TokenBucket(_RESETS_PER_S, _RESETS_AT_ONCE / _RESETS_PER_S, now_s)


def free_calls(now_s: float) -> TokenBucket:
    """Return what counts a connection's calls that no quota bounds."""
    return TokenBucket(_FREE_CALLS_PER_S, _FREE_CALLS_AT_ONCE / _FREE_CALLS_PER_S, now_s)


Member = TypeVar("Member", bound=Closable)


def connections_that_fit(asked: int) -> int:
    """Return how many connections there may be: as many as are asked for, or 0 for as many as descriptors are free."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if asked or soft == resource.RLIM_INFINITY:
        return asked or 1 << 20
    used = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0  # noqa: PTH112, PTH208 - numbers, not files
    return max(_CONNECTIONS_MIN, soft - used - _DESCRIPTORS_KEPT)


class Crowd(Generic[Member]):
    """The open connections. One that comes when there are too many takes the place of the one that does least.

    That is the oldest that never had a call, or else the one without a call for the longest time. If all have calls, it
    is the newcomer.
    """

    def __init__(self, connections_max: int, metrics: ConnectionMetrics) -> None:
        self._most = connections_max
        self.metrics = metrics
        self.open: set[Member] = set()
        #: Those that never had a call, and those that have none now, the oldest first. Dictionaries keep their order.
        self._unused: dict[Member, None] = {}
        self._idle: dict[Member, None] = {}

    def enter(self, newcomer: Member) -> bool:
        """Take a connection in, and close another for it if need be; return whether there is room."""
        if len(self.open) >= self._most:
            self.metrics.closed("crowded")
            least = next(iter(self._unused), None) or next(iter(self._idle), None)
            if least is None:
                return False
            self.leave(least)
            least.abort()
        self.open.add(newcomer)
        self._unused[newcomer] = None
        self.metrics.open = len(self.open)
        return True

    def leave(self, one: Member) -> None:
        self.open.discard(one)
        self._unused.pop(one, None)
        self._idle.pop(one, None)
        self.metrics.open = len(self.open)

    def works(self, one: Member) -> None:
        """Note that a connection has work: its first call, or one again."""
        self._unused.pop(one, None)
        self._idle.pop(one, None)

    def rests(self, one: Member) -> None:
        """Note that a connection has no work any more."""
        if one in self.open and one not in self._unused:
            self._idle[one] = None
