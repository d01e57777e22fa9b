"""Several servers on one port: each a process with an event loop, models and engine streams of its own.

The kernel gives each new connection to one of them (SO_REUSEPORT). A frontend with few connections should open several,
or one of them may get all of its calls.
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
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import structlog
import uvloop

from kernels.cores import cores
from kernels.engines import default_streams
from server.app import StartError, serve
from server.config import ServerConfig
from server.runtime.listening import ListenError, interfaces
from server.runtime.signals import ending_signals
from server.telemetry.logs import configure_logs

_log = structlog.get_logger(__name__)

#: So many processes may die in so many seconds; beyond, starting more would only hide what is wrong.
_DEATHS_MAX, _DEATHS_WITHIN_S = 5, 60.0
#: The exit code of a process that could not serve; a new one could not either.
_CANNOT_SERVE = 3
#: What a process may take beyond `drain_s` to end.
_GRACE_S = 5.0
_SIGNALS_MAX = 64


def serve_processes(config: ServerConfig) -> None:
    """Run `config.processes` servers until a signal asks for their end, then let all of them drain.

    One that dies is replaced; its callers see UNAVAILABLE and reach another.

    Raises:
        StartError: the port is taken, a process could not serve (its log says why), or they keep dying.
    """
    with reserved_port(config) as port, _signals() as heard:
        # Else a child would import the standard library from the folder that the server was started in first.
        os.environ["PYTHONSAFEPATH"] = "1"
        context = multiprocessing.get_context("spawn")

        def start(number: int) -> BaseProcess:
            settings = settings_of(config, number, port).model_dump()  # as JSON, secrets would be stars
            process = context.Process(target=_one, args=(settings,), name=f"pinrank-{number}")
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
                        raise StartError(f"process {number} ended with {process.exitcode}; its log says why")
                    _log.error("process_died", number=number, exitcode=process.exitcode)
                    running[number] = start(number)
        finally:
            end_processes(running, heard, config.drain_s + _GRACE_S)


def settings_of(config: ServerConfig, number: int, grpc_port: int) -> ServerConfig:
    """Return the settings of one of several servers: its own HTTP port, and its part of the cores and the GPUs."""
    devices = config.devices_of(number)
    streams = default_streams(config.engine, max(1, cores() // config.processes))
    changes = {
        "grpc_port": grpc_port,
        "http_port": config.http_port + number if config.http_port else 0,
        "device": devices if config.device else None,
        "engine_streams": config.engine_streams or streams,
    }
    return config.model_copy(update=changes)


def _one(settings: dict[str, object]) -> None:
    config = ServerConfig(**settings)  # type: ignore[arg-type]
    configure_logs(config.log_level, config.log_format, config.secrets())
    threading.Thread(target=_end_with_parent, args=(config.drain_s + _GRACE_S,), name="parent", daemon=True).start()
    try:
        uvloop.run(serve(config, shared_port=True))
    except Exception as error:  # the boundary of a process: the parent only sees its exit code
        _log.error("cannot_serve", error=str(error))
        raise SystemExit(_CANNOT_SERVE) from error


def _end_with_parent(within_s: float) -> None:
    """Wait for the parent's end, however it came, and drain then: an orphan would keep the port, and nobody stop it.

    The parent holds the other end of a pipe, which closes with it. That holds on every system and misses no parent that
    was gone before; a signal at its death (PR_SET_PDEATHSIG) would come at the end of the thread that started this
    process, and on Linux only. On a thread of its own, as an event loop that hangs is no reason to stay.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of multiprocessing has one"  # noqa: S101
    wait([parent.sentinel])
    _log.error("parent_died", reason="it ended without ending this process; draining")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(within_s)
    _log.error("process_killed", reason=f"it did not end within {within_s:g} s")
    os._exit(1)


def end_processes(processes: list[BaseProcess], heard: socket.socket, within_s: float) -> None:
    """Let all drain, and pass on the impatience of who sends SIGINT once more."""
    for process in processes:
        process.terminate()  # SIGTERM: it drains
    until_s = time.monotonic() + within_s
    signals = heard.recv(_SIGNALS_MAX)[1:] if wait([heard], 0) else b""  # the first of them brought us here
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
    """Find out that nobody else has the port, and hold it so that nobody takes it between our processes."""
    port = config.grpc_port
    try:
        where = interfaces(config.host)
    except ListenError as error:
        raise StartError(str(error)) from error
    with ExitStack() as held:
        for interface in where:
            try:
                # One that listens conflicts with whatever else does or is held; connections of an earlier server that
                # are not quite gone (TIME_WAIT) do not count for it.
                with interface.bound(port, socket.SO_REUSEADDR) as alone:
                    alone.listen()
                    port = alone.getsockname()[1]
                holder = held.enter_context(interface.bound(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT))
            except OSError as error:
                raise StartError(
                    f"cannot listen on {interface.at(port)} ({error.strerror}); is another server there? "
                    "Set grpc_port to move"
                ) from error
            # From here on only our processes, which share the port, may be there too.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield port


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Turn the ending signals into bytes, their numbers, on a socket that can be waited for."""
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
