"""The helper process of proofs: forks a child for each claim, lets it run for its share of the time, and tells of it.

`python -m server.proving.helper` is started by `server.proving.prover.Prover`.
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
from contextlib import suppress
from typing import IO, Any

import numpy as np

from kernels.engine import FeatureBatch, UnavailableError
from kernels.engines import ON_GPU, bundled_plan, engine_factory
from model_store.bundle.files import BundleError
from model_store.bundle.statistics import read_statistics
from model_store.model.loaded import LoadedModel, load_model
from model_store.model.utility import UtilityError, load_utility
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import open_model_store
from server.proving.prover import ANSWER_BYTES_MAX, PLAN_BYTES_MAX, ProofRequest, decoded, received, send
from server.scheduling.pace import Pace

#: Linux's; Python has no name for it.
_PR_SET_PDEATHSIG = 1
#: Opened before any fork: a forked child should take no lock that another thread of the helper may hold.
_LIBC = ctypes.CDLL(None)
#: The processor time that a child takes between pauses.
_SLICE_S = 0.004

#: What was found, float32 scores of the sample, and the engine's plan.
_Answer = tuple[dict[str, Any], bytes, bytes]


class _LogLines(logging.Handler):
    """Keeps what is logged in a process whose standard error is the server's log, for the server to log it in its form.

    `lines` has the logger, the level and the message of the first of them, cut.
    """

    _LINES_MAX, _LENGTH_MAX = 20, 1_000

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) < self._LINES_MAX:
            self.lines.append((record.name, record.levelno, record.getMessage()[: self._LENGTH_MAX]))


def _prove(claim: ProofRequest, sample: FeatureBatch | None) -> _Answer:
    """Prove in this process."""
    try:
        factory = engine_factory(claim.engine, (claim.device,))
    except ValueError as error:
        return {"fault": "environment", "error": str(error)}, b"", b""
    try:
        _bound_memory(claim)
        ref = f"{claim.model}@{claim.version}"
        bundle = open_model_store(claim.store).read(claim.model, claim.version, claim.bundle_bytes_max)
        if bundle.digest != claim.digest:
            raise ModelStoreError(f"{ref} has digest {bundle.digest} by now, not {claim.digest}")
        before = _resident_bytes()
        name = bundled_plan(claim.engine, (claim.device,)) if claim.trusted else None
        plan = bundle.files.get(name) if name else None
        model = load_model(bundle, factory, streams=1, warm=False, plan=plan)
        load_utility(claim.utility.encode() if claim.utility else model.utility_toml, model.manifest)
        read_statistics(bundle)
        logits = _scored(model, sample)
        memory = max(0, _peak_bytes() - before) + sum(map(len, bundle.files.values()))
        scores = logits.astype("<f4").tobytes()
        return {"memory_bytes": memory, "shape": list(logits.shape)}, scores, model.engine.plan() or b""
    except (ModelStoreError, UnavailableError) as error:
        return {"fault": "environment", "error": str(error)}, b"", b""
    except MemoryError:
        return (
            {"fault": "bundle", "error": f"{ref} needs more than {claim.memory_bytes_max:,} bytes of memory"},
            b"",
            b"",
        )
    except (BundleError, UtilityError) as error:
        return {"fault": "bundle", "error": str(error)}, b"", b""
    except Exception as error:  # noqa: BLE001 - whatever else a network can make a runtime raise
        return {"fault": "bundle", "error": f"{ref}: {type(error).__name__}: {error}"}, b"", b""


def _scored(model: LoadedModel, sample: FeatureBatch | None) -> np.ndarray:
    if sample is None:
        return np.empty((0, len(model.manifest.heads)), np.float32)
    try:
        return model.engine.run(sample)
    except MemoryError:
        raise
    except Exception as error:  # whatever a network can make a runtime raise; its text may quote a user's row
        raise BundleError(f"{model.manifest.ref}: {type(error).__name__} in a run of recent requests") from error


def _bound_memory(claim: ProofRequest) -> None:
    # CUDA reserves addresses for all memory there is, so that there only what can be written is counted.
    kind, column = (resource.RLIMIT_DATA, 5) if claim.engine in ON_GPU else (resource.RLIMIT_AS, 0)
    most = int(_statm()[column]) * resource.getpagesize() + claim.memory_bytes_max
    resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident_bytes() -> int:
    return int(_statm()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    """Return the most that was resident at any time: what a run takes for a moment, it takes in the server too."""
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def _statm() -> list[str]:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return file.read().split()


def _end_with(helper: int) -> None:
    """Let the kernel kill this process when its helper ends, at whatever it is, and stopped too.

    Of use in a forked child only: the signal comes when the thread that forked ends, which is the helper's only one.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != helper:  # it ended before the kernel was asked
        os._exit(1)


def _in_a_child(claim: ProofRequest, content: bytes, pace: Pace, claims: IO[bytes], said: _LogLines) -> _Answer:
    """Fork, prove there, and return the answer, or what became of the child. Raises EOFError: the server is gone."""
    ref = f"{claim.model}@{claim.version}"
    reader, writer = os.pipe()
    helper = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(helper)
        os.close(reader)
        header, *others = _prove(claim, decoded(content) if content else None)
        header["said"] = said.lines
        with os.fdopen(writer, "wb") as pipe:
            for part in (json.dumps(header).encode(), *others):
                send(pipe, part)
        os._exit(0)
    os.close(writer)
    said.lines.clear()  # the child tells what was said until then
    answer, ended, held_back_s = _listened(reader, child, claim, pace, claims)
    used_s = cpu_s(child)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ended:
        error = (
            f"{ref}: not proven within {claim.timeout_s:g} s, of which it was let run {used_s:.3g} s and held back "
            f"{held_back_s:.3g} s for requests; if that is too little for it, raise swap.proof_timeout_s or "
            "swap.cpu_share"
        )
        return {"fault": "environment" if held_back_s > claim.timeout_s / 2 else "bundle", "error": error}, b"", b""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"fault": "bundle", "error": f"{ref}: the process that tried it was killed by {name}"}, b"", b""
    try:
        read = io.BytesIO(answer)
        header, scores = json.loads(received(read, ANSWER_BYTES_MAX)), received(read, ANSWER_BYTES_MAX)
        return header, scores, received(read, PLAN_BYTES_MAX)
    except (EOFError, ValueError, struct.error):
        code = os.WEXITSTATUS(status)
        return {"fault": "bundle", "error": f"{ref}: the process that tried it ended with {code}"}, b"", b""


def _listened(reader: int, child: int, claim: ProofRequest, pace: Pace, claims: IO[bytes]) -> tuple[bytes, bool, float]:
    """Collect what a child writes, letting it run only for its share of the time.

    Priorities do not do that: a core's two threads share what they compute with, and what runs on an idle one slows the
    other down.

    Returns:
        What it wrote, whether it ended by itself, and the seconds that it was held back beyond its share.

    Raises:
        EOFError: the server is gone; the child is killed.
    """
    answer = bytearray()
    until_s = time.monotonic() + claim.timeout_s
    paused_at_s = held_back_s = 0.0
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while time.monotonic() < until_s and len(answer) <= ANSWER_BYTES_MAX + PLAN_BYTES_MAX:
            ready = select.select([pipe, claims], [], [], _SLICE_S)[0]
            if claims in ready:  # the server says nothing more while it waits for an answer
                os.kill(child, signal.SIGKILL)
                raise EOFError("the server is gone")
            if pipe in ready:
                part = pipe.read(1 << 20)
                if not part:
                    return bytes(answer), True, held_back_s
                answer += part
            elif claim.share < 1 and (used_s := cpu_s(child) - paused_at_s) >= _SLICE_S:
                os.kill(child, signal.SIGSTOP)
                held_back_s += pace.pause(used_s, claim.share)
                paused_at_s += used_s
                os.kill(child, signal.SIGCONT)
    return bytes(answer), False, held_back_s


def cpu_s(process: int) -> float:
    """Return the processor time of a process: what `clock_getcpuclockid` gives on Linux, which Python lacks."""
    return time.clock_gettime(~process << 3 | 2)


def main() -> None:
    """Serve claims from standard input until it is closed.

    The arguments: the descriptor of the server's pace, how far this process's priority is below the server's, and the
    engine that the server serves with.
    """
    pace, engine = Pace(int(sys.argv[1])), sys.argv[3]
    os.nice(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and the terminal's end are the server's
        signal.signal(number, signal.SIG_IGN)
    answers, claims = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # whatever a runtime prints is no answer
    said = _LogLines()
    logging.basicConfig(handlers=[said], level=logging.WARNING)
    # Imported before the forks, for no proof to spend its time on it (PyTorch takes seconds). No device is touched and
    # nothing is computed here: CUDA does not survive a fork, nor do the threads that PyTorch computes with.
    with suppress(ValueError):  # what is not installed: each proof says so
        engine_factory(engine)
    while True:
        try:
            claim = ProofRequest(**json.loads(received(claims, ANSWER_BYTES_MAX)))
            content = received(claims, 1 << 40)
            header, *others = _in_a_child(claim, content, pace, claims, said)
            for part in (json.dumps(header).encode(), *others):
                send(answers, part)
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
