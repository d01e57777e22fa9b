"""Run the phases one after the other, each as a process group, which is killed when its time is up.

`bench/gpu-ten-minutes.sh` and `bench/gpu-four-minutes.sh` start it. It needs only Python.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from bench.gpu.guard import Guard
from bench.gpu.numbers import DRY_FILE, FILE, WITHOUT, Numbers, file_of, read
from bench.gpu.plan import FOUR_MINUTES, TEN_MINUTES, PlanError, PlannedPhase, expected, plan

LOG = "log.txt"
#: Size limits for the log of a phase and of a folder; the rest is discarded.
_PHASE_BYTES_MAX, _LOG_BYTES_MAX = 1 << 18, 8 << 20
_LAST_WORDS = 400
_LOOK_S = 0.05
#: Seconds before the kill in which a phase can record which numbers it has no time for.
_GRACE_S = 1.0
#: Time for a process to exit after SIGKILL, in seconds.
_KILLED_S = 5.0


class RunError(Exception):
    """The run cannot start. The message says why."""


def run(
    phases: Sequence[PlannedPhase], out: Path, began_s: float, *, dry_run: bool, scratch: Path | None = None
) -> bool:
    """Run every phase, even after failures. Return whether all phases ended successfully.

    Args:
        phases: the phases in order.
        out: folder of the results.
        began_s: start of the run, on the monotonic clock.
        dry_run: whether this is a dry run, whose numbers mean nothing.
        scratch: folder for temporary files, which is deleted afterwards; None creates one.

    Raises:
        RunError: another run uses the folder of the results.
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another run writes to {out}; wait for its end, or choose another folder") from error
        guard = Guard(scratch := scratch or Path(tempfile.mkdtemp(prefix="pinrank-gpu-")))
        try:
            return _run_all(phases, out, began_s, guard, {**os.environ, "TMPDIR": str(scratch)}, dry_run=dry_run)
        finally:
            guard.close()


def _run_all(
    phases: Sequence[PlannedPhase],
    out: Path,
    began_s: float,
    guard: Guard,
    environment: Mapping[str, str],
    *,
    dry_run: bool,
) -> bool:
    well = True
    for phase in phases:
        started_s, ends_s = time.monotonic(), began_s + phase.ends_at_s
        print(f"{started_s - began_s:6.1f} s  {phase.name}", flush=True)
        why = _run(phase, out / LOG, ends_s, guard, environment)
        numbers = Numbers(out, phase.name, ends_s, dry_run=dry_run)
        numbers.add("the phase", {"seconds": time.monotonic() - started_s, **({"ended": why} if why else {})})
        lines = read(file_of(out, dry_run=dry_run)).lines
        there = {line["what"] for line in lines if line["phase"] == phase.name}
        for what in expected(phase.name, dry_run=dry_run):
            if what not in there:
                numbers.missing(what, why or WITHOUT)
        if why:
            print(f"          {why}", flush=True)
            well = False
    return well


def _run(phase: PlannedPhase, log: Path, ends_s: float, guard: Guard, environment: Mapping[str, str]) -> str:
    """Run one phase. If it fails, return the reason with the end of its output."""
    if time.monotonic() >= ends_s:
        return "not started: the time was up"
    command = [*phase.command, "--until", str(ends_s - _GRACE_S)]
    with log.open("ab", buffering=0) as kept:
        kept.write(f"== {phase.name}\n".encode())
        output = Output(kept, min(_PHASE_BYTES_MAX, _LOG_BYTES_MAX - kept.tell()))
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            return f"not started: {error}"
        guard.tell(process.pid)
        code = _watched(process, output, ends_s)
        guard.tell(0)
    words = f": {output.last_words()}" if output.last_words() else ""
    if code is None:
        return f"killed after {phase.limit_s:g} s and what was left of earlier phases{words}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}{words}"
    return f"ended with {code}{words}" if code else ""


def _watched(process: subprocess.Popen[bytes], output: Output, ends_s: float) -> int | None:
    """Wait for a process until `ends_s`, and kill its group. Return its exit code, or None if it was killed."""
    assert process.stdout is not None  # noqa: S101 - the pipes were requested
    os.set_blocking(process.stdout.fileno(), False)
    code = None
    with selectors.DefaultSelector() as ready, process.stdout as pipe:
        ready.register(pipe, selectors.EVENT_READ)
        try:
            while (code := process.poll()) is None and time.monotonic() < ends_s:
                if not ready.get_map():  # it has closed its outputs, but is still running
                    time.sleep(_LOOK_S)
                elif ready.select(_LOOK_S) and output.take(pipe.fileno()) == b"":
                    ready.unregister(pipe)
        finally:
            # Also kill what it started and left behind, so that the next phase has the machine for itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that survives SIGKILL, because it waits for a driver, must not delay the others.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_S)
        while output.take(pipe.fileno()):
            pass
    return code


class Output:
    """The output of a phase: its beginning goes to the log, and its end into the reason for a failure."""

    def __init__(self, log: IO[bytes], bytes_max: int) -> None:
        self._log, self._room, self._end = log, max(0, bytes_max), b""

    def take(self, pipe: int) -> bytes | None:
        """Read the available output. Return None if there is none now, and b"" at the end."""
        try:
            part = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return None
        self._log.write(part[: self._room])
        self._room -= min(self._room, len(part))
        self._end = (self._end + part)[-4 * _LAST_WORDS :]
        return part

    def last_words(self) -> str:
        return " ".join(self._end.decode(errors="replace").split())[-_LAST_WORDS:]


def end_when_asked(out: Path) -> None:
    """Turn signals into an exception, so that the running phase is stopped as well."""

    def end(number: int, _: object) -> None:
        os.write(2, f"ended by {signal.Signals(number).name}; what was measured is in {out}\n".encode())
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has set it
            signal.signal(number, end)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", help="names of phases (default: all of the run)", metavar="PHASE")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="only try that everything runs; needs no GPU")
    parser.add_argument("--four-minutes", action="store_true", help="run the phases of the rerun by default")
    parser.add_argument("--used-s", type=float, default=0.0, help="seconds of the run that have already passed")
    parser.add_argument(
        "--scratch", type=Path, help="folder for temporary files, deleted at the end (default: a new one)"
    )
    options = parser.parse_args()
    began_s = time.monotonic() - options.used_s
    end_when_asked(options.out)
    try:
        return _measured(options, began_s)
    except (PlanError, RunError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot go on: {error}; what was measured is in {options.out}", file=sys.stderr)
        return 1
    finally:
        if options.scratch is not None:  # even if no run has started
            shutil.rmtree(options.scratch, ignore_errors=True)


def _measured(options: argparse.Namespace, began_s: float) -> int:
    other = options.out / (FILE if options.dry_run else DRY_FILE)
    if other.exists():
        raise RunError(f"{other} is from {'a real' if options.dry_run else 'a dry'} run; choose another folder")
    names = options.phases or (FOUR_MINUTES if options.four_minutes else TEN_MINUTES)
    phases = plan(names, str(options.out), dry_run=options.dry_run)
    well = run(phases, options.out, began_s, dry_run=options.dry_run, scratch=options.scratch)
    print(f"{time.monotonic() - began_s:6.1f} s  done: {options.out}", flush=True)
    found = read(file_of(options.out, dry_run=options.dry_run)).lines
    wrong = [f"{line['phase']}, {line['what']}" for line in found if line.get("holds") is False]
    if wrong:
        print(f"does not hold: {'; '.join(wrong)}", flush=True)
    return 0 if well and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
