"""Start the processes of a benchmark, and read their CPU time and metrics."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from bench.harness import BenchmarkError
from pinrank.channels import open_channel
from pinrank.tls import ClientTls

#: Enough on a CPU. On a GPU, which captures graphs first, callers pass a longer time.
_START_S = 60.0
_LOOK_S = 0.2
_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a process: its own pages, and pages of mapped files, which belong to the page cache.

    The feature store is such a file: its pages count once they are read, and the system can reclaim them.
    """

    own_bytes: int
    file_bytes: int


class ServerProcess(NamedTuple):
    """A running server: its address, process id and metrics URL."""

    address: str
    pid: int
    metrics_url: str

    def metric(self, name: str) -> float:
        """Return the sum of all samples of a metric."""
        return sum(value for _, value in self.samples(name))

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return all samples of a metric: their labels and values."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.metrics_url, timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        return [(one.labels, one.value) for family in families for one in family.samples if one.name == name]


@contextmanager
def server_process(
    config: Path,
    feature_store: str,
    log: Path,
    start_s: float = _START_S,
    metrics_age_s_max: float = 0.0,
    tls: ClientTls | None = None,
    ports: tuple[int, int] | None = None,
    descriptors_max: int | None = None,
) -> Iterator[ServerProcess]:
    """Run `pinrank serve` on loopback, and stop it afterwards in any case.

    Args:
        config: TOML file with the server's settings.
        feature_store: overrides the setting in the file.
        log: file for its standard error.
        start_s: longest time until it is ready, in seconds.
        metrics_age_s_max: its setting; by default, what is read around a load is of that moment.
        tls: how to call it, if its settings say that it speaks TLS.
        ports: its gRPC and HTTP port; by default, two free ones.
        descriptors_max: maximum number of its descriptors; by default, that of this process.

    Yields:
        The running server.

    Raises:
        BenchmarkError: it exited or is not ready in time. The message holds the end of its log.
    """
    grpc_port, http_port = ports or free_ports(2)
    program = "from server.cli.main import app; app()"
    if descriptors_max is not None:
        # Both limits: the server raises the first to the second.
        limited = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors_max}, {descriptors_max}))"
        program = f"import resource; {limited}; {program}"
    command = [
        sys.executable, "-c", program, "serve", "--config", str(config),
        "--host", "127.0.0.1", "--grpc-port", str(grpc_port), "--http-port", str(http_port),
        "--feature-store", feature_store,
    ]  # fmt: skip
    address = f"127.0.0.1:{grpc_port}"
    environment = {**os.environ, "PINRANK_HTTP__METRICS_AGE_S_MAX": f"{metrics_age_s_max:g}"}
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment) as process,
    ):
        try:
            try:
                _wait_until_ready(process, address, log, start_s, tls)
            except BenchmarkError:
                process.kill()  # it has no requests in flight
                raise
            yield ServerProcess(address, process.pid, f"http://127.0.0.1:{http_port}/metrics")
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, log: Path, start_s: float, tls: ClientTls | None
) -> None:
    until_s = time.monotonic() + start_s
    why = f"was not ready within {start_s:g} s"
    while time.monotonic() < until_s:
        try:
            why = f"did not start: it ended with {process.wait(_LOOK_S)}"
            break
        except subprocess.TimeoutExpired:
            if _serves(address, tls):
                return
    raise BenchmarkError(f"the server {why}:\n{log.read_text(errors='replace')[-2000:]}")


def _serves(address: str, tls: ClientTls | None) -> bool:
    with open_channel(address, tls=tls) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
    served: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
    return served


def single_process(calls_max: int | None = None) -> ProcessPoolExecutor:
    """Return a pool of one new process, so that its work shares no interpreter with other measured work.

    grpc.aio does not work with a second event loop in a process, so gRPC clients need `calls_max=1`.
    """
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=calls_max)


def cpu_seconds(pid: int) -> float:
    """Return the user and system CPU time of a running process and the processes that it started, in seconds.

    Resolution: 10 ms for each process.
    """
    # The second field, the command in parentheses, may contain spaces. Fields 14 to 17 are the process's own user and
    # system time, and those of its children that have ended.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own_s = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found = (one for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split())
    return own_s + sum(cpu_seconds(int(child)) for child in found)


def memory(pid: int) -> Memory:
    """Return the memory of a running process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    own, *shared = (int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssFile", "RssShmem"))
    return Memory(own, sum(shared))


def descriptors_and_threads(pid: int) -> tuple[int, int]:
    """Return the numbers of open descriptors and of threads of a running process."""
    process = Path(f"/proc/{pid}")
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def free_ports(count: int) -> list[int]:
    """Return ports of loopback on which nothing listens."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
