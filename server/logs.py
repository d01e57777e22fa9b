from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import Literal, TextIO, cast

import structlog


class _Stderr(io.TextIOBase):
    """Standard error that outlives its reader: a closed log pipe must not fail a request or a shutdown."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
        return len(text)


class _Forward(logging.Handler):
    """Hands what libraries log (gRPC, asyncio) to the same stream, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = structlog.get_logger(record.name)
            tell = log.error if record.levelno >= logging.ERROR else log.warning
            tell("library", logger=record.name, message=record.getMessage(), exc_info=record.exc_info)
        except (KeyError, TypeError, ValueError):  # a malformed record must not fail the library that made it
            self.handleError(record)


def configure_logs(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Send one event a line to standard error: JSON for machines, columns for people."""
    people = sys.stderr.isatty() if form == "auto" else form == "console"
    renderer = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks if not people else structlog.processors.StackInfoRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Stderr())),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)
