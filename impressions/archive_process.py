"""Makes Parquet files in a process of its own, in time that nobody else wants, so that rankings do not wait for it.

Linux runs a thread of the class SCHED_IDLE only while a core has nothing else to do, and stops it at once when it has.
A thread of the server could not be one: it would hold the interpreter lock while it does not run.

    server ── a byte: look; a dot, or the end: look once more, and end ──▶ process
           ◀── a line of JSON: what it counted, or what happened ──

If the server is killed, the process makes files of the segments that are left, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import structlog

from impressions.archive import Archive, ClockSteps
from impressions.places import open_place

_log = structlog.get_logger(__name__)

#: How often the spool folder is looked through without being asked: another server may have been killed.
_LOOK_S = 5.0
#: What the server writes: look; and look once more and end, now that all segments are closed.
_CALL, _END = b"\n", b"."
#: How long a killed server may take to let go of its files.
_DYING_S, _DYING_STEP_S = 10.0, 0.01
#: Seconds of rest for each second of work, so that a quota of processor time is left to rankings, too.
_REST = 4.0


@dataclass(frozen=True, slots=True)
class _Settings:
    to: str
    spool: str
    retention_days: float | None
    hurry_bytes: int
    #: Unix time less monotonic time when the server started: a process that is started again knows of later steps.
    clock_offset_s: float
    server_pid: int


class ArchiveProcess:
    """Runs the process. `run` belongs to one thread; the other methods may be called on any.

    Attributes:
        files: number of Parquet files written.
        bytes: their size.
        damaged: number of segments that could not be understood and were moved to the folder `damaged`.
        pid: the process's id; None while it does not run.
    """

    def __init__(self, to: str, spool: Path, retention_days: float | None, hurry_bytes: int) -> None:
        """Store the settings.

        Args:
            to: where the log is kept.
            spool: the folder of the segments.
            retention_days: age from which files are deleted; None keeps them.
            hurry_bytes: size of the segments from which the process no longer waits until nobody else wants the
                processor.
        """
        self._settings = _Settings(
            to, str(spool), retention_days, hurry_bytes, time.time() - time.monotonic(), os.getpid()
        )
        self._lock = threading.Lock()
        self._calls: int | None = None  # the end of a pipe, while the process runs
        self._ending = False
        self.pid: int | None = None
        self.files = self.bytes = self.damaged = 0

    def wake(self) -> None:
        """Look through the spool folder soon."""
        with self._lock:
            self._call(_CALL)

    def end(self) -> None:
        """Ask `run` to archive all that is there, and to return."""
        with self._lock:
            self._ending = True
            self._call(_END)
            self._hang_up()

    def _call(self, what: bytes) -> None:
        # One that has ended looks when it begins again; one that has not taken so many calls will look.
        if self._calls is not None:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._calls, what)

    def _hang_up(self) -> None:
        if self._calls is not None:
            os.close(self._calls)
            self._calls = None

    def run(self) -> None:
        """Archive until `end`.

        Raises:
            OSError: the place takes no files now, or the process has ended; the segments stay for the next call.
        """
        heard, calls = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(calls, False)  # a process that does not get to run must not hold up the log
        with self._lock:
            self._calls = calls
            if self._ending:
                self._call(_END)
                self._hang_up()
        # With -P, because the working folder may contain another package named `impressions`.
        command = [sys.executable, "-P", "-m", __name__, json.dumps(asdict(self._settings))]
        failure = None
        try:
            try:
                process = subprocess.Popen(command, stdin=heard, stdout=subprocess.PIPE)  # noqa: S603 - ourselves
            finally:
                os.close(heard)
            with process:
                self.pid = process.pid
                assert process.stdout is not None  # noqa: S101 - it was asked for
                try:
                    for line in process.stdout:
                        failure = self._take(json.loads(line)) or failure
                except BaseException:
                    process.kill()
                    raise
        finally:
            self.pid = None
            with self._lock:
                self._hang_up()
        if failure or process.returncode:
            raise OSError(failure or f"the process that makes Parquet files ended with {process.returncode}")

    def _take(self, line: dict[str, Any]) -> str | None:
        """Take a line. Return why the process ends, if it says so."""
        match line:
            case {"files": int(files), "bytes": int(size), "damaged": int(damaged)}:
                self.files += files
                self.bytes += size
                self.damaged += damaged
            case {"failure": str(failure)}:
                return failure
            case {"event": str(event), "level": str(level), **fields}:
                getattr(_log, level)(event, **fields)
        return None


def main() -> int:
    """Archive until standard input ends. Return the exit status."""
    sys.stdout = sys.stderr  # standard output is for reports
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the server, whose end ends this process
        signal.signal(number, signal.SIG_IGN)
    structlog.configure([structlog.processors.add_log_level, structlog.processors.format_exc_info, _report])
    settings = _Settings(**json.loads(sys.argv[1]))
    woken, ended = threading.Event(), threading.Event()
    threading.Thread(target=listen, args=(0, settings.server_pid, woken, ended), daemon=True).start()
    archive = Archive(
        open_place(settings.to),
        Path(settings.spool),
        settings.retention_days,
        ClockSteps(settings.clock_offset_s),
        rest=lambda spent_s: ended.wait(_REST * spent_s),
    )
    try:
        while True:
            last = ended.is_set()
            look(archive, settings.hurry_bytes)
            if last:
                return 0
            woken.wait(_LOOK_S)
            woken.clear()
    except OSError as error:
        _say({"failure": str(error)})
        return 1


def listen(pipe: int, server_pid: int, woken: threading.Event, ended: threading.Event) -> None:
    """Set `woken` for each call, and `ended` when the server has closed its segments, or is dead."""
    orderly = False
    while calls := os.read(pipe, 4_096):
        orderly |= _END in calls
        woken.set()
    until_s = time.monotonic() + _DYING_S
    # The pipe of a killed server may end before the locks on its segments. It has another parent when all have ended.
    while not orderly and os.getppid() == server_pid and time.monotonic() < until_s:
        time.sleep(_DYING_STEP_S)
    ended.set()
    woken.set()


def look(archive: Archive, hurry_bytes: int) -> None:
    """Archive what waits: in idle time, unless so many bytes wait.

    Raises:
        OSError: the place takes no files now.
    """
    try:
        if archive.waiting_bytes >= hurry_bytes:
            archive.look()
        else:  # on a thread of its own: one that has become idle cannot be made another without privileges
            with ThreadPoolExecutor(1, initializer=_become_idle) as pool:
                pool.submit(archive.look).result()
    finally:
        if archive.files or archive.damaged:
            _say({"files": archive.files, "bytes": archive.bytes, "damaged": archive.damaged})
        archive.files = archive.bytes = archive.damaged = 0


def _become_idle() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:  # such as a sandbox that does not know the class
        os.nice(19)
        _warn_not_idle(str(error))


@cache
def _warn_not_idle(reason: str) -> None:
    """Warn once, and not every time that the folder is looked through."""
    _log.warning("archive_not_idle", reason=reason, instead="niceness 19")


def _report(_: Any, __: str, event: MutableMapping[str, Any]) -> NoReturn:
    """Send an event to the server, which writes it into its log of events."""
    _say(dict(event))
    raise structlog.DropEvent


def _say(fields: dict[str, Any]) -> None:
    line = json.dumps(fields, default=str).encode() + b"\n"
    try:
        os.write(1, line)
    except BrokenPipeError:  # the server has been killed; events are still worth a look
        if "event" in fields:
            os.write(2, line)


if __name__ == "__main__":
    sys.exit(main())
