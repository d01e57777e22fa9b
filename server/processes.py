"""Several servers on one port: each a process with an event loop, models and engine streams of its own.

The kernel gives each new connection to one of them (SO_REUSEPORT). A frontend with few connections should open several,
or one of them may get all of its calls.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import structlog
import uvloop

from kernels.cores import cores
from kernels.opening import default_streams
from server.app import StartError, serve
from server.config import ServerConfig
from server.logs import configure_logs

_log = structlog.get_logger(__name__)

#: So many processes may die in so many seconds; beyond, starting more would only hide what is wrong.
_DEATHS_MAX, _DEATHS_WITHIN_S = 5, 60.0
#: The exit code of a process that could not serve; a new one could not either.
_CANNOT_SERVE = 3
#: What a process may take beyond `drain_s` to end.
_GRACE_S = 5.0


def serve_processes(config: ServerConfig) -> None:
    """Run `config.processes` servers until SIGTERM or SIGINT, then let all of them drain.

    One that dies is replaced; its callers see UNAVAILABLE and reach another.

    Raises:
        StartError: the port is taken, a process could not serve (its log says why), or they keep dying.
    """
    with _reserved_port(config) as port, _signals() as stop:
        context = multiprocessing.get_context("spawn")
        streams = config.engine_streams or default_streams(config.engine, max(1, cores() // config.processes))

        def start(number: int) -> BaseProcess:
            http_port = config.http_port + number if config.http_port else 0
            changes = {"grpc_port": port, "http_port": http_port, "engine_streams": streams}
            settings = config.model_copy(update=changes).model_dump(mode="json")
            process = context.Process(target=_one, args=(settings,), name=f"pinrank-{number}")
            process.start()
            return process

        running = [start(number) for number in range(config.processes)]
        died_s: list[float] = []
        try:
            while True:
                ended = wait([process.sentinel for process in running] + [stop])
                if stop in ended:
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
            _end(running, config.drain_s + _GRACE_S)


def _one(settings: dict[str, object]) -> None:
    config = ServerConfig(**settings)  # type: ignore[arg-type]
    configure_logs(config.log_level, config.log_format)
    try:
        uvloop.run(serve(config, shared_port=True))
    except Exception as error:  # the boundary of a process: the parent only sees its exit code
        _log.error("cannot_serve", error=str(error))
        raise SystemExit(_CANNOT_SERVE) from error


def _end(processes: list[BaseProcess], within_s: float) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()  # SIGTERM: it drains
    until_s = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, until_s - time.monotonic()))
        if process.is_alive():
            _log.error("process_killed", name=process.name, reason=f"it did not end within {within_s:g} s")
            process.kill()
            process.join()


@contextmanager
def _reserved_port(config: ServerConfig) -> Iterator[int]:
    """Find out that nobody else has the port, and hold it so that nobody takes it between our processes."""
    address = (config.host, config.grpc_port)
    try:
        with socket.socket() as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
    except OSError as error:
        raise StartError(
            f"cannot listen on {config.host}:{config.grpc_port} ({error.strerror}); is another server there? "
            "Set grpc_port to move"
        ) from error
    with holder:
        yield address[1]


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Turn SIGTERM and SIGINT into bytes on a socket that can be waited for."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # noqa: FBT003 - the standard library's
    before = signal.set_wakeup_fd(writer.fileno())
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield reader
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()
