"""Logs events to standard error, one per line, without secrets or users' data; limits their length and frequency."""

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

#: Where a library's message starts to quote its input, such as a method's name, a task's result or a server's reply.
_QUOTES = re.compile(r"[^A-Za-z ,.'_-]|(?<![A-Za-z])[bru]?'")
#: Our own modules that log through the standard library's `logging`.
_OURS = ("kernels.", "ranker.")


class _Stderr(io.TextIOBase):
    """Standard error that ignores a closed pipe, which must not fail a request or a shutdown."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except BrokenPipeError:
                # The reader is gone for good. At exit, Python would flush again, fail, and exit with code 120.
                with Path(os.devnull).open("wb") as nowhere:
                    os.dup2(nowhere.fileno(), sys.stderr.fileno())
        return len(text)


class _Limits:
    """A structlog processor that drops events that are too frequent. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rates = EventRates()

    def __call__(self, _logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        now_s = time.monotonic()
        with self._lock:
            decision = self.rates.decide(_kind(event), now_s)
            unreported = self.rates.unreported(now_s)
        for name, lines in unreported.items():
            structlog.get_logger(__name__).warning("log_lines_withheld", of=name, lines=lines)
        if isinstance(decision, WithholdLine):
            raise structlog.DropEvent
        if decision.withheld:
            event["withheld_before"] = decision.withheld
        return event

    def report_rest(self) -> None:
        """At the process's exit, log the numbers of withheld lines that were not reported yet."""
        with self._lock:
            unreported = self.rates.unreported(float("inf"))
        for name, lines in unreported.items():
            structlog.get_logger(__name__).warning("log_lines_withheld", of=name, lines=lines)


_limits = _Limits()
atexit.register(_limits.report_rest)


def withheld_lines() -> Mapping[str, int]:
    """Return the number of log lines withheld since the process started, by event."""
    return _limits.rates.withheld.copy()


def _kind(event: EventDict) -> str:
    return f"{event['event']} {event['logger']}" if event["event"] == "library" else str(event["event"])


class _Forward(logging.Handler):
    """Forwards the log records of libraries (gRPC, asyncio) to structlog, so that they have the same form."""

    def __init__(self, *, quote: bool) -> None:
        super().__init__()
        self._quote = quote

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, grpc.aio.InternalError):
            # gRPC could not send a status or an answer because the caller had ended the call, which is not an error.
            log.debug("caller_gone", logger=record.name)
            return
        write = log.error if record.levelno >= logging.ERROR else log.warning
        try:
            text = record.getMessage()
        except (KeyError, TypeError, ValueError):  # a malformed record must not fail the library that logged it
            text = str(record.msg)
        whole = self._quote or record.name.startswith(_OURS)
        message = text if whole else _QUOTES.split(text, maxsplit=1)[0].strip()
        write("library", logger=record.name, message=message, at=f"{record.pathname}:{record.lineno}", exc_info=error)


def _uncaught(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "unknown"
        structlog.get_logger(__name__).error("thread_failed", thread=name, exc_info=args.exc_value)


def _exceptions(*, quote: bool, people: bool) -> Processor:
    """Make a processor that renders `exc_info` as types and frames; structlog's own would show frames' variables."""

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
    """Return a value escaped for a column; a line break in it could otherwise fake another event."""
    return repr(value) if key != "exception" and isinstance(value, str) and not value.isprintable() else value


def configure_logs(level: str, form: Literal["auto", "json", "console"], secrets: Iterable[str] = ()) -> None:
    """Write log events to standard error, one per line: JSON for machines, columns for people.

    Args:
        level: lowest level that is written. Lines contain users' data only at `debug`.
        form: `auto` writes columns on a terminal and JSON elsewhere.
        secrets: texts to redact from every line.
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
        # Redact before values are cut, or part of a secret could remain; and again after rendering, for nested values.
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
