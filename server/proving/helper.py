"""The prover's helper process: forks a child to test each new model version, and limits the child's processor time.

`server.proving.prover.Prover` starts it as `python -m server.proving.helper`.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from kernels.engine import FeatureBatch, UnavailableError
from kernels.engines import ON_GPU, bundled_plan, engine_factory
from model_store.bundle.files import NETWORK, Bundle, BundleError, parse_manifest, sha256
from model_store.bundle.statistics import read_statistics
from model_store.exploration.table import read_exploration
from model_store.model.loaded import LoadedModel, load_model
from model_store.model.utility import UtilityError, check_time, load_utility
from model_store.network.check import NetworkError, RunLimits, check_network
from server.proving.confinement import confine
from server.proving.largest_run import check_largest_run
from server.proving.prover import (
    ANSWER_BYTES_MAX,
    CLAIM_BYTES_MAX,
    PLAN_BYTES_MAX,
    ProofLimits,
    decoded,
    received,
    send,
)
from server.scheduling.pace import Pace

#: The constant of Linux's prctl(2); Python does not define it.
_PR_SET_PDEATHSIG = 1
#: Opened before any fork, because a forked child must not take a lock that another thread of the helper may hold.
_LIBC = ctypes.CDLL(None)
#: Processor time that a child may use between pauses.
_SLICE_S = 0.004
#: What is kept of a child's words.
_SAID_BYTES_MAX = 16 << 10

#: The header (a JSON object), the sample's logits as float32 bytes, and the engine's plan.
_Answer = tuple[dict[str, Any], bytes, bytes]


class _LogLines(logging.Handler):
    """Collects warnings and errors, so that the server can log them in its own format.

    Attributes:
        lines: logger, level and message of the first lines, each message cut to a length limit.
    """

    LINES_MAX, LENGTH_MAX = 20, 1_000

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) < self.LINES_MAX:
            self.lines.append((record.name, record.levelno, record.getMessage()[: self.LENGTH_MAX]))


@dataclass(frozen=True, slots=True)
class _Claim:
    """What the server asks to prove: bytes that nobody has parsed yet."""

    ref: str
    limits: ProofLimits
    sample: bytes
    manifest_json: bytes
    files: dict[str, bytes]

    @classmethod
    def received(cls, pipe: IO[bytes]) -> _Claim:
        header = json.loads(received(pipe, CLAIM_BYTES_MAX))
        sample, manifest_json = (received(pipe, CLAIM_BYTES_MAX) for _ in range(2))
        files = {name: received(pipe, CLAIM_BYTES_MAX) for name in header["files"]}
        return cls(header["ref"], ProofLimits(**header["limits"]), sample, manifest_json, files)


def _prove(claim: _Claim) -> _Answer:
    """Prove a version in this process, and score the sample with it."""
    ref, limits = claim.ref, claim.limits
    try:
        factory = engine_factory(limits.engine, (limits.device,))
    except ValueError as error:
        return {"fault": "environment", "error": str(error)}, b"", b""
    try:
        _bound_memory(limits)
        unconfined = confine(on_gpu=limits.engine in ON_GPU)
        before = _resident_bytes()
        manifest = parse_manifest(claim.manifest_json, ref)
        bundle = Bundle(manifest, claim.manifest_json, sha256(claim.manifest_json), claim.files)
        run = RunLimits(limits.rows_max, limits.run_bytes_max)
        name = bundled_plan(limits.engine, (limits.device,)) if limits.trusted else None
        plan = bundle.files.get(name) if name else None
        if plan is not None:  # it spares compiling the network, and not checking it
            check_network(bundle.files[NETWORK], manifest.specs, run)
        model = load_model(bundle, factory, streams=1, warm=False, plan=plan, limits=run)
        utility = load_utility(limits.utility.encode() if limits.utility else model.utility_toml, manifest)
        check_time(utility, limits.rows_max)
        read_exploration(bundle, utility)
        read_statistics(bundle)
        logits = _scored(model, decoded(claim.sample) if claim.sample else None)
        on_gpu = limits.engine in ON_GPU
        check_largest_run(model, bundle, run, limits.requests_max, limits.run_s_max, on_gpu=on_gpu)
        memory = max(0, _peak_bytes() - before) + sum(map(len, bundle.files.values()))
        scores = logits.astype("<f4").tobytes()
        header = {"memory_bytes": memory, "shape": list(logits.shape), "unconfined": unconfined}
        return header, scores, model.engine.plan() or b""
    except UnavailableError as error:
        return {"fault": "environment", "error": str(error)}, b"", b""
    except MemoryError:
        return (
            {"fault": "bundle", "error": f"{ref} needs more than {limits.memory_bytes_max:,} bytes of memory"},
            b"",
            b"",
        )
    except NetworkError as error:
        return {"fault": "bundle", "error": f"{ref}: {error}"}, b"", b""
    except (BundleError, UtilityError) as error:
        return {"fault": "bundle", "error": str(error)}, b"", b""
    except Exception as error:  # noqa: BLE001 - a network can make its runtime raise any error
        return {"fault": "bundle", "error": f"{ref}: {type(error).__name__}: {error}"}, b"", b""


def _scored(model: LoadedModel, sample: FeatureBatch | None) -> np.ndarray:
    if sample is None:
        return np.empty((0, len(model.manifest.heads)), np.float32)
    try:
        return model.engine.run(sample)
    except MemoryError:
        raise
    except Exception as error:  # any error of the runtime; its text may quote a user's row
        raise BundleError(
            f"{model.manifest.ref}: scoring recent requests failed with {type(error).__name__}"
        ) from error


def _bound_memory(limits: ProofLimits) -> None:
    # CUDA reserves address space for all memory of the machine, so for GPU engines only writable memory is limited.
    kind, column = (resource.RLIMIT_DATA, 5) if limits.engine in ON_GPU else (resource.RLIMIT_AS, 0)
    most = int(_statm()[column]) * resource.getpagesize() + limits.memory_bytes_max
    resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident_bytes() -> int:
    return int(_statm()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    """Return the peak of resident memory: a run needs its peak in the server too, if only for a moment."""
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def _statm() -> list[str]:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return file.read().split()


def _end_with(helper: int) -> None:
    """Make the kernel kill this process when its helper ends, even while this process is stopped.

    Call it only in a forked child: the kernel sends the signal when the thread that forked ends, and the helper has one
    thread.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != helper:  # the helper ended before prctl was called
        os._exit(1)


def _keep_only(writer: int, errors: int) -> None:
    """Close what the helper has open, above all its pipes to and from the server, and its standard error."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.closerange(3, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))


def _in_a_child(claim: _Claim, pace: Pace, claims: IO[bytes], logged: _LogLines) -> _Answer:
    """Prove in a forked child; return its answer or how it ended. Raises EOFError when the server is gone."""
    reader, writer = os.pipe()
    # Not the server's standard error, into which the child could write lines of a log.
    said, errors = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    helper = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(helper)
        _keep_only(writer, errors)
        header, *others = _prove(claim)
        header["log_lines"] = logged.lines
        with os.fdopen(writer, "wb") as pipe:
            for part in (json.dumps(header).encode(), *others):
                send(pipe, part)
        os._exit(0)
    os.close(writer)
    os.close(errors)
    logged.lines.clear()  # the child's answer has the lines logged before the fork
    try:
        words = bytearray()
        header, *others = _outcome(child, reader, claim, pace, claims, partial(_hear, said, words))
        _hear(said, words)
        header["log_lines"] = [*header.get("log_lines", ()), *_lines_of(bytes(words))]
    finally:
        os.close(said)
    return header, others[0], others[1]


def _hear(said: int, words: bytearray) -> None:
    """Take what the child wrote to standard output and standard error, and keep the beginning."""
    with suppress(BlockingIOError):
        while part := os.read(said, 1 << 16):
            words += part[: _SAID_BYTES_MAX - len(words)]


def _lines_of(words: bytes) -> list[tuple[str, int, str]]:
    lines = words.decode(errors="replace").splitlines()[: _LogLines.LINES_MAX]
    return [(__name__, logging.WARNING, f"the proving process says: {line[: _LogLines.LENGTH_MAX]}") for line in lines]


def _outcome(
    child: int, reader: int, claim: _Claim, pace: Pace, claims: IO[bytes], hear: Callable[[], None]
) -> _Answer:
    """Wait for a child's end; return its answer or how it ended. Raises EOFError when the server is gone."""
    ref = claim.ref
    answer, ended, held_back_s = _answer_of(reader, child, claim.limits, pace, claims, hear)
    used_s = cpu_s(child)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ended:
        error = (
            f"{ref}: the proof did not finish within {claim.limits.timeout_s:g} s: it used {used_s:.3g} s of processor "
            f"time and was paused for {held_back_s:.3g} s in favour of requests; if it needs more time, raise "
            "swap.proof_timeout_s or swap.cpu_share"
        )
        return (
            {"fault": "environment" if held_back_s > claim.limits.timeout_s / 2 else "bundle", "error": error},
            b"",
            b"",
        )
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"fault": "bundle", "error": f"{ref}: the proving process was killed by {name}"}, b"", b""
    try:
        read = io.BytesIO(answer)
        header, scores = json.loads(received(read, ANSWER_BYTES_MAX)), received(read, ANSWER_BYTES_MAX)
        return header, scores, received(read, PLAN_BYTES_MAX)
    except (EOFError, ValueError, struct.error):
        code = os.WEXITSTATUS(status)
        return {"fault": "bundle", "error": f"{ref}: the proving process ended with exit status {code}"}, b"", b""


def _answer_of(
    reader: int, child: int, limits: ProofLimits, pace: Pace, claims: IO[bytes], hear: Callable[[], None]
) -> tuple[bytes, bool, float]:
    """Collect a child's answer, and let the child run only for its share of the time.

    A low priority is not enough: the two hardware threads of a core share its execution units, so that a process on an
    idle one slows down the other.

    Returns:
        The bytes that it wrote, whether it ended by itself, and the seconds that it was paused beyond its share.

    Raises:
        EOFError: the server is gone; the child is killed.
    """
    answer = bytearray()
    until_s = time.monotonic() + limits.timeout_s
    paused_at_s = held_back_s = 0.0
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while time.monotonic() < until_s and len(answer) <= ANSWER_BYTES_MAX + PLAN_BYTES_MAX:
            hear()
            ready = select.select([pipe, claims], [], [], _SLICE_S)[0]
            if claims in ready:  # the server sends nothing while it waits, so its end of the pipe closed
                os.kill(child, signal.SIGKILL)
                raise EOFError("the server is gone")
            if pipe in ready:
                part = pipe.read(1 << 20)
                if not part:
                    return bytes(answer), True, held_back_s
                answer += part
            elif limits.share < 1 and (used_s := cpu_s(child) - paused_at_s) >= _SLICE_S:
                os.kill(child, signal.SIGSTOP)
                held_back_s += pace.pause(used_s, limits.share)
                paused_at_s += used_s
                os.kill(child, signal.SIGCONT)
    return bytes(answer), False, held_back_s


def cpu_s(process: int) -> float:
    """Return a process's processor time in seconds, by the clock of `clock_getcpuclockid`, which Python lacks."""
    return time.clock_gettime(~process << 3 | 2)


def main() -> None:
    """Answer claims from standard input until it is closed.

    The command line has three arguments: the file descriptor of the server's pace, the niceness to add to this process,
    and the name of the engine that the server uses.
    """
    pace, engine = Pace(int(sys.argv[1])), sys.argv[3]
    os.nice(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGHUP):  # the server handles Ctrl-C and the terminal's end
        signal.signal(number, signal.SIG_IGN)
    answers, claims = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # keep what a runtime prints out of the answers
    logged = _LogLines()
    logging.basicConfig(handlers=[logged], level=logging.WARNING)
    # Import the engine before any fork, so that no proof spends time on it (PyTorch takes seconds). Use no device and
    # compute nothing here: neither CUDA nor PyTorch's compute threads survive a fork.
    with suppress(ValueError):  # the engine is not installed; each proof reports that
        engine_factory(engine)
    while True:
        try:
            header, *others = _in_a_child(_Claim.received(claims), pace, claims, logged)
            for part in (json.dumps(header).encode(), *others):
                send(answers, part)
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
