"""What may stand in the log: how often an event, how long a line, and what of an exception. Pure."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: A line of a log collector is cut, or lost, beyond 16 KiB.
LINE_BYTES_MAX = 8_192
_EXCEPTIONS_MAX, _FRAMES_MAX = 8, 24
_TEXT_MAX = 500
#: Exceptions of these packages say what we wrote; those of others may quote what they were given: a key, a row.
_OURS = frozenset({"server", "feature_client", "model_store"})
#: They quote paths and sizes.
_PLAIN = (OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class WriteLine:
    """Write the line; so many of its event were withheld since the last one."""

    withheld: int


@dataclass(frozen=True, slots=True)
class WithholdLine:
    """Leave the line out; its event comes too often."""


@dataclass(slots=True)
class _Event:
    lines_left: float
    seen_s: float
    withheld: int = 0


@dataclass(slots=True)
class EventRates:
    """Lets through `burst` lines of an event at once and `per_s` after them: a token bucket for each event.

    Attributes:
        withheld: lines left out since the start, by event.
    """

    burst: int = 50
    per_s: float = 2.0
    #: So long after the last of an event, what was withheld of it is told by itself.
    quiet_s: float = 10.0
    #: More kinds of events share one bucket.
    events_max: int = 256
    withheld: Counter[str] = field(default_factory=Counter)
    _events: dict[str, _Event] = field(default_factory=dict)

    def decide(self, event: str, now_s: float) -> WriteLine | WithholdLine:
        """Say whether a line about an event may be written now."""
        if event not in self._events and len(self._events) >= self.events_max:
            event = "other events"
        known = self._events.setdefault(event, _Event(self.burst, now_s))
        known.lines_left = min(self.burst, known.lines_left + (now_s - known.seen_s) * self.per_s)
        known.seen_s = now_s
        if known.lines_left < 1:
            known.withheld += 1
            self.withheld[event] += 1
            return WithholdLine()
        known.lines_left -= 1
        withheld, known.withheld = known.withheld, 0
        return WriteLine(withheld)

    def untold(self, now_s: float) -> dict[str, int]:
        """Return how many lines were withheld of events that are quiet by now; each is returned once."""
        told = {}
        for event, known in self._events.items():
            if known.withheld and now_s - known.seen_s >= self.quiet_s:
                told[event], known.withheld = known.withheld, 0
        return told


def fitted(render: Callable[[Mapping[str, Any]], str], event: Mapping[str, Any], bytes_max: int) -> str:
    """Render an event within a number of bytes; where it is longer, its values are cut, and `cut` says so."""
    line = render(event)
    room = bytes_max // max(1, len(event))
    while len(line.encode()) > bytes_max and room:
        line = render({key: _cut(value, room) for key, value in event.items()} | {"cut": True})
        room //= 2
    return line


def _cut(value: Any, characters_max: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= characters_max else f"{text[:characters_max]}... ({len(text)} characters)"


def described(error: BaseException, *, quote: bool) -> list[dict[str, Any]]:
    """Return an exception and its causes: types and frames, never the frames' variables.

    Args:
        error: the last of its chain.
        quote: whether the texts of all exceptions are given; without, those that may quote users' data are not.
    """
    found: list[dict[str, Any]] = []
    for one in _chain(error):
        shown: dict[str, Any] = {"type": f"{type(one).__module__}.{type(one).__qualname__}".removeprefix("builtins.")}
        if quote or isinstance(one, _PLAIN) or type(one).__module__.partition(".")[0] in _OURS:
            shown["text"] = _cut(str(one), _TEXT_MAX)
        frames = [
            f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
            for frame, line in traceback.walk_tb(one.__traceback__)
        ]
        shown["frames"] = frames[-_FRAMES_MAX:]
        if len(frames) > _FRAMES_MAX:
            shown["frames_left_out"] = len(frames) - _FRAMES_MAX
        found.append(shown)
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting and len(seen) < _EXCEPTIONS_MAX:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        cause = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if cause is not None:
            waiting.append(cause)
