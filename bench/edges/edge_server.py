"""Serve one echo behind one gRPC server, for bench/edges/edges.py, in an environment of its own.

Usage: edge_server.py native|grpc.aio|pygrpc_native.aio|pygrpc_native. Reads the answer from standard input, and prints
JSON: port, process id, and the versions that it runs. It ends with its standard input. Only `native` needs pinrank.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from importlib import import_module, metadata
from typing import Any

import uvloop

SERVICE, METHOD = "pinrank.v1.RankingService", "Rank"


def told(port: int) -> None:
    versions = {name: _version(name) for name in ("grpcio", "pygrpc-native", "uvloop")}
    print(json.dumps({"port": port, "pid": os.getpid(), "versions": versions}), flush=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


async def _aio(module: Any, answer: bytes) -> None:
    """Answer on the event loop, with a module that has the interface of grpc.aio."""
    import grpc  # noqa: PLC0415 - the low-level server works without it

    async def rank(_request: bytes, _context: Any) -> bytes:
        return answer

    server = module.server()
    # Registered by name: pygrpc-native passes generic handlers on to a grpc.aio server behind it.
    handler: Any = grpc.unary_unary_rpc_method_handler(rank)
    server.add_registered_method_handlers(SERVICE, {METHOD: handler})
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    told(port)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    await server.stop(None)


async def _native(answer: bytes) -> None:
    """Answer through the server's own edge."""
    import grpc  # noqa: PLC0415 - the low-level server works without it

    # Other environments lack these.
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    from server.edge.endpoint import PortLimits  # noqa: PLC0415
    from server.edge.native_endpoint import NativeEndpoint  # noqa: PLC0415
    from server.telemetry.metrics import ConnectionMetrics  # noqa: PLC0415

    async def rank(_request: bytes, _context: Any) -> bytes:
        return answer

    methods: Any = {METHOD: grpc.unary_unary_rpc_method_handler(rank)}
    endpoint = NativeEndpoint(
        {SERVICE: methods}, PortLimits(1 << 20), ConnectionMetrics(CollectorRegistry()), shared_port=False
    )
    await endpoint.start("127.0.0.1", 0)
    told(int(endpoint.listens_on))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    await endpoint.stop()


def _low_level(module: Any, answer: bytes) -> None:
    """Answer on the thread that receives the calls, without an event loop: the least that this package can cost."""
    front = module.NativeGrpcFront("127.0.0.1:0", [(f"/{SERVICE}/{METHOD}", False)])
    front.start()

    def serve() -> None:
        while (events := front.recv_batch(64)) is not None:
            for kind, call, *_ in events:
                if kind == module.EVENT_CALL:
                    front.respond(call, answer)

    threading.Thread(target=serve, daemon=True).start()
    told(front.bound_port)
    sys.stdin.buffer.read()
    front.close()


def main() -> None:
    size = int.from_bytes(sys.stdin.buffer.read(4), "little")
    answer = sys.stdin.buffer.read(size)
    if sys.argv[1] == "native":
        uvloop.run(_native(answer))
        return
    module = import_module(sys.argv[1])
    if sys.argv[1].endswith(".aio"):
        uvloop.run(_aio(module, answer))
    else:
        _low_level(module, answer)


if __name__ == "__main__":
    main()
