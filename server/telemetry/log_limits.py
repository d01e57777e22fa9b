"""Limits of the log: how often an event may occur, how long a line may be, what it shows of an exception. Pure."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Log collectors cut or drop lines beyond 16 KiB.
LINE_BYTES_MAX = 8_192
_EXCEPTIONS_MAX, _FRAMES_MAX = 8, 24
_TEXT_MAX = 500
#: Packages whose exception texts are safe to log; other packages may quote their input, such as a key or a row.
_OURS = frozenset({"server", "feature_client", "model_store"})
#: Built-in exceptions whose texts are safe to log, because they quote only paths and sizes.
_PLAIN = (OSError, MemoryError)


#: Events of which every line is written: what operators did. Only who may manage models can cause them.
AUDITED = frozenset({"model_call"})


@dataclass(frozen=True, slots=True)
class WriteLine:
    """Write the line; `withheld` lines of its event were left out since the last one."""

    withheld: int


@dataclass(frozen=True, slots=True)
class WithholdLine:
    """Leave the line out, because its event is too frequent."""


@dataclass(slots=True)
class _Event:
    lines_left: float
    seen_s: float
    withheld: int = 0


@dataclass(slots=True)
class EventRates:
    """A token bucket for each event: allows `burst` lines at once, then `per_s` lines per second.

    Attributes:
        withheld: number of lines left out since the start, by event.
    """

    burst: int = 50
    per_s: float = 2.0
    #: This long after an event's last line, a line of its own reports how many were withheld.
    quiet_s: float = 10.0
    #: Events beyond this number share one bucket.
    events_max: int = 256
    withheld: Counter[str] = field(default_factory=Counter)
    _events: dict[str, _Event] = field(default_factory=dict)

    def decide(self, event: str, now_s: float) -> WriteLine | WithholdLine:
        """Decide whether a line of an event may be written now."""
        if event in AUDITED:
            return WriteLine(0)
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

    def unreported(self, now_s: float) -> dict[str, int]:
        """Return the numbers of withheld lines of events that have been quiet for `quiet_s`, and reset them."""
        found = {}
        for event, known in self._events.items():
            if known.withheld and now_s - known.seen_s >= self.quiet_s:
                found[event], known.withheld = known.withheld, 0
        return found


def fitted(render: Callable[[Mapping[str, Any]], str], event: Mapping[str, Any], bytes_max: int) -> str:
    """Render an event in at most `bytes_max` bytes; cut its values if needed, and then add `cut` to the line."""
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
    """Describe an exception and its causes by types and stack frames, without the frames' variables.

    Args:
        error: the exception that was raised last.
        quote: whether to include all exceptions' texts; otherwise texts that may quote users' data are left out.
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
