"""Proving a version where it can do no harm: in a process of its own, forked for it and gone afterwards.

A network file is a program from somewhere else. What compiling and running it may do (crash, take all memory, never
end) happens to a child of a small helper process (`server.proving.helper`), which has what the served engine needs
imported and waits at the lowest priority; the server hears that it failed, and why. This is the server's side, and what
both sides say to each other.
"""

from __future__ import annotations

import io
import json
import logging
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np

from kernels.engine import FeatureBatch
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import BundleError
from server.scheduling.pace import Pace

_LENGTH = struct.Struct(">Q")
#: An answer is a few numbers and the scores of the sample.
ANSWER_BYTES_MAX = 256 << 20
PLAN_BYTES_MAX = 4 << 30


class ProvingError(Exception):
    """The proof could not be made for reasons that are not the bundle's; a later try may succeed."""


class HelperEndedError(ProvingError):
    """The helper process ended; the next proof starts another."""


@dataclass(frozen=True, slots=True)
class ProofRequest:
    """What is to be proven.

    Attributes:
        store: the model store's URL.
        model, version, digest: which bundle.
        engine: by name.
        utility: a table to use instead of the bundle's own.
        bundle_bytes_max: refuse a larger bundle.
        memory_bytes_max: that the child may map beyond what it begins with.
        timeout_s: after which it is killed.
        trusted: whether a publisher that the server trusts signed it, so that its plans may run.
        share: of one core's time that the child may take.
        device: the GPU to prove on, if the engine is of one.
    """

    store: str
    model: str
    version: int
    digest: str
    engine: str
    utility: str | None
    bundle_bytes_max: int
    memory_bytes_max: int
    timeout_s: float
    trusted: bool = False
    share: float = 1.0
    device: int = 0


@dataclass(frozen=True, slots=True)
class Proof:
    """A bundle that holds what it promises.

    Attributes:
        memory_bytes: that one stream of it took at most.
        logits: float32[N, H] of the sample's rows.
        plan: what the engine made of the network, if it has a form to keep.
    """

    memory_bytes: int
    logits: np.ndarray
    plan: bytes | None


class Prover:
    """The server's side. `prove` blocks; one at a time, from any thread.

    Attributes:
        pace: of the proofs, which rest the longer while it is busy.
    """

    def __init__(self, engine: str, *, nice: int = 19) -> None:
        """Remember.

        Args:
            engine: what is mostly proven on; imported once, for all proofs. Others are imported by each proof.
            nice: how far the helper's priority is below this process's; 19 is the lowest that there is.
        """
        self.pace = Pace()
        self._engine, self._nice = engine, nice
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None

    @property
    def helper_pid(self) -> int | None:
        """The process id of the helper; None while there is none."""
        helper = self._helper
        return helper.pid if helper else None

    def start(self) -> None:
        """Start the helper, for the first proof not to wait for it."""
        with self._lock:
            self._started()

    def prove(self, claim: ProofRequest, sample: FeatureBatch | None) -> Proof:
        """Prove a claim in a process of its own, and score a sample of requests with it.

        Raises:
            BundleError: the bundle is at fault; the message says how.
            ProvingError: something else is.
        """
        with self._lock:
            helper = self._started()
            assert helper.stdin is not None  # noqa: S101 - both were asked for
            assert helper.stdout is not None  # noqa: S101
            try:
                send(helper.stdin, json.dumps(asdict(claim)).encode())
                send(helper.stdin, encoded(sample) if sample else b"")
                answer = json.loads(received(helper.stdout, ANSWER_BYTES_MAX))
                content = received(helper.stdout, ANSWER_BYTES_MAX)
                plan = received(helper.stdout, PLAN_BYTES_MAX)
                for name, level, message in answer.pop("said", ()):
                    logging.getLogger(str(name)).log(int(level), "%s", message)
            except (BrokenPipeError, EOFError, ValueError) as error:
                self._end()
                raise HelperEndedError(f"the helper process ended: {error}") from error
        match answer:
            case {"fault": "bundle", "error": str(reason)}:
                raise BundleError(reason)
            case {"error": str(reason)}:
                raise ProvingError(reason)
            case {"memory_bytes": int(memory), "shape": [int(rows), int(heads)]} if len(content) == 4 * rows * heads:
                logits = np.frombuffer(bytearray(content), np.float32).reshape(rows, heads)
                return Proof(memory, logits, plan or None)
        raise BundleError(f"{claim.model}@{claim.version}: the proof's answer is none")

    def close(self) -> None:
        """End the helper, and whatever it is at. Nothing may be proven afterwards."""
        helper = self._helper  # without the lock: a proof in progress is given up
        if helper is not None:
            helper.kill()
        with self._lock:
            self._end()
            self.pace.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._helper is not None and self._helper.poll() is not None:
            self._end()
        if self._helper is None:
            self._helper = subprocess.Popen(  # noqa: S603 - ourselves
                # In the server's own session: Linux shares the processors out by session before it looks at priorities.
                # And without the folder that it was started in on its path: that may hold a `model_store` of others.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "server.proving.helper",
                    str(self.pace.file),
                    str(self._nice),
                    self._engine,
                ],
                pass_fds=[self.pace.file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._helper

    def _end(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            for pipe in (self._helper.stdin, self._helper.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:  # what was not sent yet
                        continue
            self._helper.wait()
            self._helper = None


def send(pipe: IO[bytes], content: bytes) -> None:
    """Write a message: its length, then its bytes."""
    pipe.write(_LENGTH.pack(len(content)) + content)
    pipe.flush()


def received(pipe: IO[bytes], bytes_max: int) -> bytes:
    """Read a message. Raises EOFError where the pipe ends in it, ValueError for a longer one."""
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    if length > bytes_max:
        raise ValueError(f"a message of {length} bytes")
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    content = pipe.read(length)
    if len(content) != length:
        raise EOFError("the pipe was closed")
    return content


def encoded(sample: FeatureBatch) -> bytes:
    """Return a batch as a message."""
    arrays = {"row_splits": sample.row_splits}
    arrays |= {f"request/{name}": tensor for name, tensor in sample.request.items()}
    arrays |= {f"candidate/{name}": tensor for name, tensor in sample.candidate.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def decoded(content: bytes) -> FeatureBatch:
    """Return the batch of a message of `encoded`."""
    arrays = decode_arrays(content)

    def side(which: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(which): array for name, array in arrays.items() if name.startswith(which)}

    return FeatureBatch(side("request/"), side("candidate/"), arrays["row_splits"])
