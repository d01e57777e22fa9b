"""Runs one server in this process until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import socket

import structlog

from kernels.cores import answer_at_once
from server.app import Server
from server.config import ServerConfig
from server.runtime.descriptors import raise_descriptor_limit
from server.runtime.memory import set_up_allocator
from server.runtime.signals import Ending, heed_signals

_log = structlog.get_logger(__name__)

#: Time that a stopping server may take beyond `lame_duck_s` and `drain_s`.
_EXIT_GRACE_S = 15.0


async def serve(config: ServerConfig, *, channel: socket.socket | None = None) -> None:
    """Run a server until a signal arrives, then drain it; a signal during the start cancels the start."""
    set_up_allocator()
    raise_descriptor_limit()
    loop = asyncio.get_running_loop()
    ending = heed_signals(loop, config.stop_s_max + _EXIT_GRACE_S)
    server = Server(config, channel=channel)
    server.catch_strays(loop)
    if not await _started(server, ending):
        _log.info("stopped_during_start")
        return
    if not answer_at_once():
        _log.info("event_loop_without_priority")
    # Objects that exist now live as long as the server, so the garbage collector need not scan them again.
    gc.freeze()
    await ending.asked.wait()
    await server.drain_and_close(ending.hurried)


async def _started(server: Server, ending: Ending) -> bool:
    """Start a server; return False if a signal arrived before it was serving."""
    start, asked = asyncio.ensure_future(server.start()), asyncio.ensure_future(ending.asked.wait())
    await asyncio.wait({start, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    start.cancel()  # has no effect if the start is done
    try:
        await start
    except asyncio.CancelledError:
        return False
    return True
