"""Servers to compare with, in separate processes: an echo, and the engine behind plain grpc.aio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection

import grpc.aio
import numpy as np
import uvloop

from bench.engines.engine_alone import EngineSubject, load_subject
from feature_client.fetch import fetch
from feature_client.near_cache import near_caches
from feature_client.stores.open_store import open_store
from model_store.model.selection import select
from model_store.model.utility import load_utility
from pinrank.v1 import ranking_pb2

_START_S = 60.0
#: Age up to which a near cache's rows count, as in the server's default settings.
_STALE_S = 30.0
_Answer = Callable[[bytes], Awaitable[bytes]]


@contextmanager
def echo_process(subject: EngineSubject) -> Iterator[tuple[str, int]]:
    """Serve a Rank method with a constant answer, to measure gRPC itself. Yields address and process id."""
    with _process(_echo, subject) as found:
        yield found


@contextmanager
def plain_process(subject: EngineSubject, near_cache_bytes: int = 0) -> Iterator[tuple[str, int]]:
    """Serve the same model in a simple way: fetch, assemble, run the engine in a thread pool, answer.

    It has the server's engine with as many streams, the server's fetch from the same feature store, uvloop, and the
    server's calibration, utilities and order. It has no batching, no split of a request, no admission and no deadlines:
    requests wait in order of arrival. It has no near cache either, unless the caller gives it one of this size.

    Yields address and process id.
    """
    with _process(partial(_plain, near_cache_bytes=near_cache_bytes), subject) as found:
        yield found


@contextmanager
def _process(make: Callable[[EngineSubject], Awaitable[_Answer]], subject: EngineSubject) -> Iterator[tuple[str, int]]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(make, subject, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(_START_S):
            raise TimeoutError("the peer did not start")
        port, pid = ours.recv()
        yield f"127.0.0.1:{port}", pid
    finally:
        process.kill()
        process.join()


def _serve(make: Callable[[EngineSubject], Awaitable[_Answer]], subject: EngineSubject, parent: Connection) -> None:
    async def main() -> None:
        answer = await make(subject)

        async def rank(content: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await answer(content)

        server = grpc.aio.server()
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(rank)
        handlers = grpc.method_handlers_generic_handler("pinrank.v1.RankingService", {"Rank": handler})
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        parent.send((port, os.getpid()))
        await server.wait_for_termination()

    uvloop.run(main())


async def _echo(subject: EngineSubject) -> _Answer:
    pin_ids = ranking_pb2.RankRequest.FromString(subject.requests[0]).pin_ids
    response: bytes = ranking_pb2.RankResponse(pin_ids=pin_ids, utilities=[0.5] * len(pin_ids)).SerializeToString()

    async def answer(_: bytes) -> bytes:
        return response

    return answer


async def _plain(subject: EngineSubject, near_cache_bytes: int) -> _Answer:
    model = load_subject(subject)
    utility = load_utility(model.utility_toml, model.manifest)
    store = open_store(subject.feature_store, read_only=True)
    await store.start()
    caches = near_caches(model.needs.pin_groups, near_cache_bytes, _STALE_S) if near_cache_bytes else None
    pool = ThreadPoolExecutor(subject.streams)
    loop = asyncio.get_running_loop()

    async def answer(content: bytes) -> bytes:
        request = ranking_pb2.RankRequest.FromString(content)
        pin_ids = np.array(request.pin_ids, np.uint64)
        fetched = await fetch(store, model.needs, request.user_id, pin_ids, near=caches)
        batch = model.assembler.assemble(fetched, request.surface)
        logits = await loop.run_in_executor(pool, model.engine.run, batch)
        parties = utility.party_utilities(request.surface, model.probabilities(logits), fetched)
        utilities = utility.combine(request.surface, parties)
        order = select(utilities)
        response = ranking_pb2.RankResponse(pin_ids=pin_ids[order].tolist(), utilities=utilities[order].tolist())
        serialised: bytes = response.SerializeToString()
        return serialised

    return answer
