"""Runs several servers on one port; each is a process with its own event loop, models and engine streams.

The kernel gives each new connection to one of the processes (SO_REUSEPORT). A client with a single connection therefore
uses a single process; let it open several.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import structlog
import uvloop

from kernels.cores import cores
from kernels.engines import default_streams
from server.app import StartError
from server.config import ServerConfig
from server.edge.tls import load_certificates
from server.process import serve
from server.runtime.descriptors import raise_descriptor_limit
from server.runtime.listening import ListenError, http_shown, http_sockets, interfaces
from server.runtime.signals import ending_signals
from server.runtime.supervisor import Supervisor
from server.runtime.tls import Certificates, TlsError
from server.telemetry.logs import configure_logs
from server.web.http_port import HttpPort, listening
from server.web.pages import site
from server.web.several import SeveralProcesses

_log = structlog.get_logger(__name__)

#: If more processes than this die within this many seconds, the server gives up: restarts would only hide the problem.
_DEATHS_MAX, _DEATHS_WITHIN_S = 5, 60.0
#: Exit code of a process that could not serve; we do not replace it, because a new one would fail, too.
_CANNOT_SERVE = 3
#: Time that a process may take to end beyond `lame_duck_s` and `drain_s`.
_GRACE_S = 5.0
_SIGNALS_MAX = 64


def serve_processes(config: ServerConfig) -> None:
    """Run `config.processes` servers until a signal arrives, then let all of them drain.

    A process that dies is replaced; its callers see UNAVAILABLE and reach another process when they retry. The HTTP
    port belongs to this process, which asks the others.

    Raises:
        StartError: the port is taken, a process could not serve (its log says why), or processes keep dying.
    """
    raise_descriptor_limit()
    several = SeveralProcesses(config.http)
    with reserved_port(config) as port, _http_port(config, several) as http_port, _signals() as heard:
        # Without this, a child would look for the standard library in the current folder first.
        os.environ["PYTHONSAFEPATH"] = "1"
        context = multiprocessing.get_context("spawn")

        def start(number: int) -> BaseProcess:
            settings = settings_of(config, number, port, http_port).model_dump()  # JSON would mask the secrets
            with several.add(number) as channel:
                process = context.Process(target=_one, args=(settings, channel), name=f"pinrank-{number}")
                process.start()
            return process

        running: list[BaseProcess] = []
        died_s: list[float] = []
        try:
            running += (start(number) for number in range(config.processes))
            while True:
                ended = wait([process.sentinel for process in running] + [heard])
                if heard in ended:
                    return
                for number, process in enumerate(running):
                    if process.sentinel not in ended:
                        continue
                    process.join()
                    died_s = [at_s for at_s in died_s if time.monotonic() - at_s < _DEATHS_WITHIN_S]
                    died_s.append(time.monotonic())
                    if process.exitcode == _CANNOT_SERVE or len(died_s) > _DEATHS_MAX:
                        raise StartError(f"process {number} exited with code {process.exitcode}; its log says why")
                    _log.error("process_died", number=number, exitcode=process.exitcode)
                    running[number] = start(number)
        finally:
            end_processes(running, heard, config.stop_s_max + _GRACE_S)


@contextmanager
def _http_port(config: ServerConfig, several: SeveralProcesses) -> Iterator[int]:
    """Serve the HTTP port for all processes, and yield its number."""
    try:
        opened = http_sockets(config.host, config.http_port)
    except ListenError as error:
        raise StartError(str(error)) from error
    certificates = load_certificates(config)
    supervisor, ended = Supervisor(), threading.Event()
    tls = None if certificates is None else lambda: certificates.current.http
    port = HttpPort([listening(one) for one in opened], site(several.pages()), config.http, supervisor, tls)
    port.start()
    if certificates is not None:
        supervisor.thread("tls-certificates", partial(_renew, certificates, config.tls.reload_s, ended)).start()
    number = opened[0].getsockname()[1]
    _log.info("http_open", http=http_shown(config.host, number))
    try:
        yield number
    finally:
        supervisor.close()
        ended.set()
        port.close()


def _renew(certificates: Certificates, every_s: float, ended: threading.Event) -> None:
    """Follow the certificate's files; the log says which change is refused."""
    while not ended.wait(every_s):
        try:
            certificates.renew()
        except TlsError as error:
            _log.error("tls_certificate_refused", reason=str(error), serving=certificates.current.serial)


def settings_of(config: ServerConfig, number: int, grpc_port: int, http_port: int) -> ServerConfig:
    """Return the settings of one of the processes: the ports of all, and its share of the cores and the GPUs."""
    devices = config.devices_of(number)
    streams = default_streams(config.engine, max(1, cores() // config.processes))
    changes = {
        "grpc_port": grpc_port,
        "http_port": http_port,
        "device": devices if config.device else None,
        "engine_streams": config.engine_streams or streams,
    }
    return config.model_copy(update=changes)


def _one(settings: dict[str, object], channel: socket.socket) -> None:
    config = ServerConfig(**settings)  # type: ignore[arg-type]
    configure_logs(config.log_level, config.log_format, config.secrets())
    threading.Thread(target=_end_with_parent, args=(config.stop_s_max + _GRACE_S,), name="parent", daemon=True).start()
    try:
        uvloop.run(serve(config, channel=channel))
    except Exception as error:  # the boundary of a process: the parent only sees its exit code
        _log.error("cannot_serve", error=str(error))
        raise SystemExit(_CANNOT_SERVE) from error


def _end_with_parent(within_s: float) -> None:
    """Wait until the parent process has ended for any reason, then drain; an orphan would keep the port forever.

    The parent holds the other end of a pipe, which closes when the parent ends. This works on every system, even if the
    parent has already ended. The alternative, PR_SET_PDEATHSIG, exists only on Linux, and sends its signal when the
    thread that started this process ends. This function runs on its own thread, so that it works even if the event loop
    hangs.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "multiprocessing started this process"  # noqa: S101
    wait([parent.sentinel])
    _log.error("parent_died", reason="the parent ended without stopping this process; draining")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(within_s)
    _log.error("process_killed", reason=f"it did not end within {within_s:g} s")
    os._exit(1)


def end_processes(processes: list[BaseProcess], heard: socket.socket, within_s: float) -> None:
    """Let all processes drain, pass on a second SIGINT, and kill those that take longer than `within_s` seconds."""
    for process in processes:
        process.terminate()  # SIGTERM: it drains
    until_s = time.monotonic() + within_s
    signals = heard.recv(_SIGNALS_MAX)[1:] if wait([heard], 0) else b""  # the first of them started the drain
    while running := [process for process in processes if process.is_alive()]:
        if signal.SIGINT in signals:
            for process in running:
                os.kill(process.pid or 0, signal.SIGINT)
        ready = wait([process.sentinel for process in running] + [heard], max(0.0, until_s - time.monotonic()))
        if not ready:
            break
        signals = heard.recv(_SIGNALS_MAX) if heard in ready else b""
    for process in running:
        _log.error("process_killed", name=process.name, reason=f"it did not end within {within_s:g} s")
        process.kill()
        process.join()


@contextmanager
def reserved_port(config: ServerConfig) -> Iterator[int]:
    """Check that no other server uses the port, and reserve it, so that only our processes can listen on it."""
    port = config.grpc_port
    try:
        config.check_transport()
        where = interfaces(config.host)
    except ListenError as error:
        raise StartError(str(error)) from error
    with ExitStack() as held:
        for interface in where:
            try:
                # A listening socket conflicts with every other socket that listens on or reserves the port, but not
                # with an earlier server's connections in TIME_WAIT.
                with interface.bound(port, socket.SO_REUSEADDR) as alone:
                    alone.listen()
                    port = alone.getsockname()[1]
                holder = held.enter_context(interface.bound(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT))
            except OSError as error:
                raise StartError(
                    f"cannot listen on {interface.at(port)} ({error.strerror}); is another server using it? "
                    "Set grpc_port to another port"
                ) from error
            # From now on, only our processes, which set SO_REUSEPORT, can bind the port.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield port


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Yield a socket that receives the number of each ending signal as a byte, so that we can wait for signals."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # noqa: FBT003 - the standard library's
    before = signal.set_wakeup_fd(writer.fileno())
    handlers = {number: signal.signal(number, lambda *_: None) for number in ending_signals()}
    try:
        yield reader
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()
