"""Events to standard error, one a line: without secrets, without what users sent, bounded in length and number."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal, TextIO, cast

import grpc.aio
import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from feature_client.redaction import hidden
from server.telemetry.log_limits import LINE_BYTES_MAX, EventRates, WithholdLine, described, fitted

#: Where a library begins to quote what it was given: a method's name, a task's result, a server's reply.
_QUOTES = re.compile(r"[^A-Za-z ,.'_-]|(?<![A-Za-z])[bru]?'")
#: Our own modules that log as libraries do.
_OURS = ("kernels.", "ranker.")


class _Stderr(io.TextIOBase):
    """Standard error that outlives its reader: a closed log pipe must not fail a request or a shutdown."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except BrokenPipeError:
                # Its reader never comes back; Python would try again at the end, and exit with 120 for it.
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), sys.stderr.fileno())
        return len(text)


class _Limits:
    """The process's rates, asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rates = EventRates()

    def __call__(self, _logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        now_s = time.monotonic()
        with self._lock:
            decision = self.rates.decide(_kind(event), now_s)
            untold = self.rates.untold(now_s)
        for name, lines in untold.items():
            structlog.get_logger(__name__).warning("log_lines_withheld", of=name, lines=lines)
        if isinstance(decision, WithholdLine):
            raise structlog.DropEvent
        if decision.withheld:
            event["withheld_before"] = decision.withheld
        return event

    def tell_rest(self) -> None:
        """Write what was withheld and not told yet, at the process's end."""
        with self._lock:
            untold = self.rates.untold(float("inf"))
        for name, lines in untold.items():
            structlog.get_logger(__name__).warning("log_lines_withheld", of=name, lines=lines)


_limits = _Limits()
atexit.register(_limits.tell_rest)


def withheld_lines() -> Mapping[str, int]:
    """Return how many lines were left out since the process's start, by event, as they came too often."""
    return _limits.rates.withheld.copy()


def _kind(event: EventDict) -> str:
    return f"{event['event']} {event['logger']}" if event["event"] == "library" else str(event["event"])


class _Forward(logging.Handler):
    """Hands what libraries log (gRPC, asyncio) to the same stream, in the same form."""

    def __init__(self, *, quote: bool) -> None:
        super().__init__()
        self._quote = quote

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, grpc.aio.InternalError):
            # gRPC could not send a status or an answer, as the call's caller had ended it: no fault of anyone's.
            log.debug("caller_gone", logger=record.name)
            return
        tell = log.error if record.levelno >= logging.ERROR else log.warning
        try:
            said = record.getMessage()
        except (KeyError, TypeError, ValueError):  # a malformed record must not fail the library that made it
            said = str(record.msg)
        whole = self._quote or record.name.startswith(_OURS)
        message = said if whole else _QUOTES.split(said, maxsplit=1)[0].strip()
        tell("library", logger=record.name, message=message, at=f"{record.pathname}:{record.lineno}", exc_info=error)


def _uncaught(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "unknown"
        structlog.get_logger(__name__).error("thread_failed", thread=name, exc_info=args.exc_value)


def _exceptions(*, quote: bool, people: bool) -> Processor:
    """Make the processor that turns `exc_info` into types and frames; structlog's own shows the frames' variables."""

    def show(exc_info: ExcInfo) -> Any:
        found = described(exc_info[1], quote=quote)
        if not people:
            return found
        lines = []
        for one in found:
            lines.append(f"{one['type']}{': ' + one['text'] if 'text' in one else ''}")
            lines += [f"  {frame}" for frame in one["frames"]]
        return "\n".join(lines)

    return structlog.processors.ExceptionRenderer(show)


def _on_one_line(key: str, value: Any) -> Any:
    """Return a value as it stands in a column: one that would begin a line of its own could pass for another event."""
    return repr(value) if key != "exception" and isinstance(value, str) and not value.isprintable() else value


def configure_logs(level: str, form: Literal["auto", "json", "console"], secrets: Iterable[str] = ()) -> None:
    """Send one event a line to standard error: JSON for machines, columns for people.

    Args:
        level: below it nothing is written. Only at `debug` do lines hold what users sent.
        form: `auto` writes for people on a terminal and JSON elsewhere.
        secrets: what no line may hold, should anything that is logged quote it.
    """
    people = sys.stderr.isatty() if form == "auto" else form == "console"
    number = logging.getLevelNamesMapping()[level.upper()]
    quote = number <= logging.DEBUG
    colors = sys.stderr.isatty()
    columns = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = structlog.processors.JSONRenderer()
    if people:

        def renderer(logger: WrappedLogger, name: str, event: EventDict) -> str:
            return str(columns(logger, name, {key: _on_one_line(key, value) for key, value in event.items()}))

    forms = {form for secret in secrets for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1])}

    def line(logger: WrappedLogger, name: str, event: MutableMapping[str, Any]) -> str:
        # Before values are cut, or a part of a secret may stay; and after, for what stands deeper in them.
        shown = {key: hidden(value, forms) if isinstance(value, str) else value for key, value in event.items()}
        return hidden(fitted(lambda fields: str(renderer(logger, name, dict(fields))), shown, LINE_BYTES_MAX), forms)

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _limits,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _exceptions(quote=quote, people=people),
            line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Stderr())),
    )
    logging.basicConfig(handlers=[_Forward(quote=quote)], level=logging.WARNING, force=True)
    threading.excepthook = _uncaught
