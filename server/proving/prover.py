"""Tests (proves) each new model version in a child process, so that a bad network cannot harm the server.

A network file is a program from elsewhere: compiling or running it may crash, use all memory or never end. This happens
in a child of a small helper process (`server.proving.helper`), and the server learns whether it failed, and why. The
helper has imported the engine and waits at the lowest priority. It gets the bundle's bytes from the server, and so
needs no access to the model store. This file has the server's side of the proof, and the messages between the two
processes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np

from kernels.engine import FeatureBatch
from model_store.bundle.archives import decode_arrays
from model_store.bundle.files import Bundle, BundleError
from server.scheduling.pace import Pace

#: Variables that interpreters, libraries and engines read. The helper's children parse what strangers made, so it gets
#: none of the others: they may hold secrets.
_INHERITED = re.compile(
    r"(PATH|HOME|TMPDIR|LANG|TZ|LD_LIBRARY_PATH|LD_PRELOAD|GLIBC_TUNABLES|VIRTUAL_ENV|XDG_CACHE_HOME|PYTHON[A-Z]+|USER|LOGNAME)$"
    r"|(LC|MALLOC|_RJEM_MALLOC|OMP|GOMP|KMP|MKL|OPENBLAS|ONEDNN|DNNL|OV|OPENVINO|TBB|BLIS|CUDA|CUDNN|CUBLAS|CUBLASLT|NVIDIA|TRT|TENSORRT|TRITON|TORCH|PYTORCH"
    r"|TORCHINDUCTOR|ASAN|UBSAN|LSAN|TSAN)_"
)
_LENGTH = struct.Struct(">Q")
#: An answer has a few numbers and the scores of the sample.
ANSWER_BYTES_MAX = 256 << 20
PLAN_BYTES_MAX = 4 << 30
#: What the server sends has been checked before.
CLAIM_BYTES_MAX = 1 << 40


class ProvingError(Exception):
    """The proof failed for reasons outside the bundle; a retry may succeed."""


class HelperEndedError(ProvingError):
    """The helper process ended unexpectedly; the next proof starts another one."""


@dataclass(frozen=True, slots=True)
class ProofLimits:
    """How to prove a version, and the limits of the proof.

    Attributes:
        engine: the engine's name.
        utility: a utility table (TOML) that replaces the bundle's own; None keeps that.
        memory_bytes_max: how much more memory the child may map than at its start.
        timeout_s: the child is killed after this many seconds.
        trusted: whether a trusted publisher signed the bundle, so that the plans in it may run.
        rows_max, requests_max, run_bytes_max, run_s_max: the largest run that the network must be fit for, in
            candidates, requests, bytes, and seconds of processor time.
        share: fraction of one core's time that the child may use.
        device: the GPU's index, for engines that run on one.
    """

    engine: str
    utility: str | None
    memory_bytes_max: int
    timeout_s: float
    trusted: bool = False
    rows_max: int = 5_000
    requests_max: int = 256
    run_bytes_max: int = 2 << 30
    run_s_max: float = 2.0
    share: float = 1.0
    device: int = 0


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of a successful proof.

    Attributes:
        memory_bytes: peak memory of one engine stream.
        logits: float32[N, H], the sample's scores.
        plan: the engine's compiled plan; None if the engine has none.
        unconfined: why the process was not wholly confined (`server.proving.confinement`); empty if it was.
    """

    memory_bytes: int
    logits: np.ndarray
    plan: bytes | None
    unconfined: str


class Prover:
    """Starts the helper process and sends it versions to prove. `prove` blocks; any thread may call it, one at a time.

    Attributes:
        pace: limits the processor time of proofs while the server is busy.
    """

    def __init__(self, engine: str, *, nice: int = 19) -> None:
        """Store the settings; `start` or the first proof starts the helper.

        Args:
            engine: the engine that the helper imports once for all proofs. A proof on another engine imports it itself.
            nice: the niceness to add in the helper; 19 gives the lowest priority.
        """
        self.pace = Pace()
        self._engine, self._nice = engine, nice
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None

    @property
    def helper_pid(self) -> int | None:
        """The helper's process id; None while it does not run."""
        helper = self._helper
        return helper.pid if helper else None

    def start(self) -> None:
        """Start the helper now, so that the first proof does not wait for it."""
        with self._lock:
            self._started()

    def prove(self, bundle: Bundle, limits: ProofLimits, sample: FeatureBatch | None) -> Proof:
        """Prove a version in a process of its own, and score a sample of requests with it.

        Raises:
            BundleError: the bundle is at fault; the message says why.
            ProvingError: something else failed; a retry may succeed.
        """
        with self._lock:
            helper = self._started()
            assert helper.stdin is not None  # noqa: S101 - both were asked for
            assert helper.stdout is not None  # noqa: S101
            try:
                header = {"limits": asdict(limits), "ref": bundle.manifest.ref, "files": list(bundle.files)}
                for part in (json.dumps(header).encode(), encoded(sample) if sample else b"", bundle.manifest_json):
                    send(helper.stdin, part)
                for part in bundle.files.values():
                    send(helper.stdin, part)
                answer = json.loads(received(helper.stdout, ANSWER_BYTES_MAX))
                content = received(helper.stdout, ANSWER_BYTES_MAX)
                plan = received(helper.stdout, PLAN_BYTES_MAX)
                for name, level, message in answer.pop("log_lines", ()):
                    logging.getLogger(str(name)).log(int(level), "%s", message)
            except (BrokenPipeError, EOFError, ValueError) as error:
                self._end()
                raise HelperEndedError(f"the helper process ended: {error}") from error
        match answer:
            case {"fault": "bundle", "error": str(reason)}:
                raise BundleError(reason)
            case {"error": str(reason)}:
                raise ProvingError(reason)
            case {
                "memory_bytes": int(memory),
                "shape": [int(rows), int(heads)],
                "unconfined": str(unconfined),
            } if len(content) == 4 * rows * heads:
                logits = np.frombuffer(bytearray(content), np.float32).reshape(rows, heads)
                return Proof(memory, logits, plan or None, unconfined)
        raise BundleError(f"{bundle.manifest.ref}: the prover returned a malformed answer")

    def close(self) -> None:
        """Kill the helper and the proof in progress. No proof may follow."""
        helper = self._helper  # without the lock, which a proof in progress holds
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
                # In the server's session, because Linux divides processor time among sessions before it looks at
                # priorities. With -P, because the working folder may contain another package named `model_store`.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "server.proving.helper",
                    str(self.pace.file),
                    str(self._nice),
                    self._engine,
                ],
                env={name: value for name, value in os.environ.items() if _INHERITED.match(name)},
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
                    except BrokenPipeError:  # closing sends what is still buffered
                        continue
            self._helper.wait()
            self._helper = None


def send(pipe: IO[bytes], content: bytes) -> None:
    """Write a message: its length (uint64, big-endian), then its bytes."""
    pipe.write(_LENGTH.pack(len(content)) + content)
    pipe.flush()


def received(pipe: IO[bytes], bytes_max: int) -> bytes:
    """Read a message. Raises EOFError when the pipe ends early, ValueError when the message exceeds `bytes_max`."""
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    if length > bytes_max:
        raise ValueError(f"a message has {length} bytes, but at most {bytes_max} are allowed")
    return _exactly(pipe, length)


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    content = pipe.read(length)
    if len(content) != length:
        raise EOFError("the pipe was closed")
    return content


def encoded(sample: FeatureBatch) -> bytes:
    """Encode a batch as a message."""
    arrays = {"row_splits": sample.row_splits}
    arrays |= {f"request/{name}": tensor for name, tensor in sample.request.items()}
    arrays |= {f"candidate/{name}": tensor for name, tensor in sample.candidate.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def decoded(content: bytes) -> FeatureBatch:
    """Decode a batch that `encoded` made."""
    arrays = decode_arrays(content)

    def side(which: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(which): array for name, array in arrays.items() if name.startswith(which)}

    return FeatureBatch(side("request/"), side("candidate/"), arrays["row_splits"])
