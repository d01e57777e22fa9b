"""Send a million hostile inputs to both ports of a server, and look for what they break or bring to light.

The server knows secrets: the admin's token, a caller's token, and the password of its Redis, which is down for the
second third of the cases. None may appear in an answer, the log or the metrics. Afterwards the server must rank as
before, and what it holds (calls, connections, descriptors, threads) must be what it held before.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import hpack

from bench.attacks import frames
from bench.attacks.clients import bearer, begin, own_channel, results_of
from bench.attacks.fuzz_cases import RawCase, RpcCase, case
from bench.attacks.place import Place, place
from bench.harness import Claim, Conclusion, Raw
from bench.processes import ServerProcess, descriptors_and_threads
from bench.test_bed import CONFIG
from loadtest.open_loop import OK, sender
from pinrank.v1 import ranking_pb2
from tests.redis_servers import RedisServer

SEED = 0
CASES = 1_000_000
_SECRETS = {
    "the admin's token": "planted-admin-token-41d7",
    "a caller's token": "planted-token-of-a-caller-98ce",
    "the password of Redis": "planted-redis-password-e350",
}
_GAUGES = ("pinrank_requests_in_flight", "pinrank_rows_in_flight", "pinrank_bytes_in_flight", "pinrank_connections")
_AT_ONCE = 32
#: Longest answer to a raw connection that is read, and how long one may stay open after the client's last byte.
_ANSWER_BYTES_MAX, _ENDED_S_MAX = 1 << 20, 10.0
#: Statuses with which a server says that it failed itself.
_FAULTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "CANCELLED")
_CALM_S, _LOOK_S = 30.0, 0.2
_FINDINGS_MAX = 20


@dataclass(frozen=True, slots=True)
class FuzzPlan:
    cases: int = CASES
    #: Cases before the server's state is noted: some threads and connections are made once they are needed.
    warm_up: int = 3_000


QUICK = FuzzPlan(cases=2_000, warm_up=600)


@dataclass(slots=True)
class Findings:
    """What cases brought to light: outcomes by kind, and the numbers of cases that show a fault."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, number: int, what: str) -> None:
        self.outcomes[f"fault: {what.partition(':')[0]}"] += 1
        if len(self.faults) < _FINDINGS_MAX:
            self.faults.append(f"case {number}: {what}")

    def check(self, number: int, *texts: Any) -> None:
        """Look for secrets in what an answer consists of."""
        joined = "\n".join(text.decode("latin-1") if isinstance(text, bytes) else str(text) for text in texts)
        for name, secret in _SECRETS.items():
            if secret in joined:
                self.add(number, f"the answer has {name}: {joined[:500]}")


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run all cases. Raises BenchmarkError if the server does not start."""
    plan = QUICK if quick else FuzzPlan()
    start_s = time.perf_counter()
    _, caller, password = _SECRETS.values()
    with place(config) as ground:
        redis = RedisServer(ground.folder, "--requirepass", password, "--appendonly", "yes")
        redis.start()
        try:
            url = f"redis://:{password}@127.0.0.1:{redis.port}/0"
            with place(config, url) as filled, filled.server("fuzzed", _settings(filled)) as server:
                _thirds(server, redis, range(CASES, CASES + plan.warm_up))
                before = _await_calm(server, redis, None)
                found = _thirds(server, redis, range(plan.cases))
                after = _await_calm(server, redis, before)
                (ranks,) = results_of(partial(_ranks, server.address, filled.requests(100, 8), caller))
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.metrics_url) as page:
                    metrics = page.read().decode()
                log = filled.log("fuzzed").read_text(errors="replace")
        finally:
            redis.kill()
    outcomes: Counter[str] = sum((one.outcomes for one in found), Counter())
    yield {
        "seed": SEED,
        "cases": plan.cases,
        "outcomes": dict(outcomes.most_common()),
        "faults": [text for one in found for text in one.faults],
        "leaks": [f"{name} in the {where}" for name, secret in _SECRETS.items()
                  for where, text in (("log", log), ("metrics", metrics)) if secret in text],
        "errors_logged": [line[:500] for line in log.splitlines() if "request_failed" in line][:9],
        "before": before,
        "after": after,
        "ranks_afterwards": ranks,
        "seconds": time.perf_counter() - start_s,
    }  # fmt: skip


def _settings(ground: Place) -> dict[str, Any]:
    admin, caller, _ = _SECRETS.values()
    token = ground.folder / "admin-token"
    token.write_text(admin)
    named = ground.folder / "callers.toml"
    digest = hashlib.sha256(caller.encode()).hexdigest()
    named.write_text(
        f'[anonymous]\nmay = ["rank"]\n[callers.frontend]\ntokens_sha256 = ["{digest}"]\n'
        'may = ["rank", "record", "seen", "reflection"]\n'
    )
    return {"admin_token_file": str(token), "callers_file": str(named), "record_actions": True, "log_format": "json"}


def _thirds(server: ServerProcess, redis: RedisServer, numbers: range) -> list[Findings]:
    """Send cases, with Redis killed for the second third of them."""
    web = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
    third = len(numbers) // 3
    found: list[Findings] = results_of(partial(fuzz, server.address, web, numbers[:third]))
    redis.kill()
    found += results_of(partial(fuzz, server.address, web, numbers[third : 2 * third]))
    redis.start()
    return found + results_of(partial(fuzz, server.address, web, numbers[2 * third :]))


def fuzz(address: str, web: str, numbers: range) -> Findings:
    """Send the cases of these numbers, in a job."""
    findings = Findings()
    tokens = tuple(_SECRETS.values())[1::-1]

    async def worker(channel: grpc.aio.Channel, waiting: Iterator[int]) -> None:
        for number in waiting:
            match case(number, SEED, tokens):
                case RpcCase() as rpc:
                    await _call(channel, number, rpc, findings)
                case RawCase() as raw:
                    await _connect(web if raw.to_http else address, number, raw, findings)

    async def main() -> None:
        async with own_channel(address) as channel:
            await channel.channel_ready()
            begin()
            waiting = iter(numbers)
            await asyncio.gather(*(worker(channel, waiting) for _ in range(_AT_ONCE)))

    asyncio.run(main())
    return findings


async def _call(channel: grpc.aio.Channel, number: int, rpc: RpcCase, findings: Findings) -> None:
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(rpc.path)
    call = method(rpc.content, timeout=rpc.timeout_s, metadata=rpc.metadata)
    answers: list[bytes] = []
    # The iterator of grpc.aio raises CancelledError for a status CANCELLED too.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        answers += [answer async for answer in call]
    status, details = (await call.code()).name, await call.details()
    if status in _FAULTS:
        findings.add(number, f"{status}: {rpc.path} {details}")
    findings.check(number, details, await call.initial_metadata(), await call.trailing_metadata(), *answers)
    findings.outcomes[f"call {status}"] += 1


async def _connect(address: str, number: int, raw: RawCase, findings: Findings) -> None:
    host, _, port = address.rpartition(":")
    received = b""
    try:
        async with asyncio.timeout(_ENDED_S_MAX):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(raw.content)
            if raw.hangs_up:
                own: socket.socket = writer.get_extra_info("socket")
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                end = "hung up"
            else:
                writer.write_eof()
                received = await reader.read(_ANSWER_BYTES_MAX) if not raw.to_http else await reader.read()
                writer.close()
                end = "closed"
    except TimeoutError:
        end = "stayed open"
        findings.add(number, f"stayed open: {raw.kind}, {_ENDED_S_MAX:g} s after its last byte")
    except OSError:
        end = "reset"
    findings.outcomes[f"{raw.kind} {end}"] += 1
    findings.check(number, received, *_headers_in(received))


def _headers_in(received: bytes) -> list[bytes]:
    """Return the headers in HTTP/2 frames, which are compressed on the wire."""
    decoder = hpack.Decoder()
    found = []
    for kind, payload in frames.frames_in(received):
        if kind == frames.HEADERS:
            try:
                found += [b": ".join(one[:2]) for one in decoder.decode(payload, raw=True)]
            except hpack.HPACKError:
                break
    return found


def _ranks(address: str, requests: tuple[bytes, ...], token: str) -> dict[str, int]:
    """Rank, in a job; return the numbers of complete answers (OK), degraded ones, and other statuses."""

    async def main() -> dict[str, int]:
        async with own_channel(address) as channel:
            begin()
            send, found = sender(channel, 10.0, bearer(token)), Counter[str]()
            for request in requests:
                status, answer = await send(request)
                degraded = ranking_pb2.RankResponse.FromString(answer).degradation.ListFields()
                found["degraded" if degraded else status] += 1
            return dict(found)

    return asyncio.run(main())


def _await_calm(server: ServerProcess, redis: RedisServer, wanted: dict[str, float] | None) -> dict[str, float]:
    """Wait until nothing is in flight, and, if given, the server holds no more than `wanted`; return what it holds.

    Connections to Redis do not count: the server keeps a bounded pool of them, as large as its busiest moment needed.
    """
    until_s = time.monotonic() + _CALM_S
    watching = redis.client(_SECRETS["the password of Redis"])
    while True:
        descriptors, threads = descriptors_and_threads(server.pid)
        clients: Any = watching.info("clients")
        descriptors -= clients["connected_clients"] - 1
        held = {name: server.metric(name) for name in _GAUGES} | {"descriptors": descriptors, "threads": threads}
        calm = not any(held[name] for name in _GAUGES)
        if time.monotonic() > until_s or (calm and (wanted is None or not grown(wanted, held))):
            return held
        time.sleep(_LOOK_S)


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return what the server holds more of afterwards, and how much."""
    return {name: after[name] - before[name] for name in before if after[name] > before[name]}


def conclude(raw: Raw) -> Conclusion:
    more = grown(raw["before"], raw["after"])
    ranks = raw["ranks_afterwards"]
    claims = (
        Claim("cases", raw["cases"], CASES, "cases", "at_least"),
        Claim("cases that showed a fault, in the answer or without one", len(raw["faults"]), 0, "cases", "at_most"),
        Claim("secrets in the log or the metrics", len(raw["leaks"]), 0, "secrets", "at_most"),
        Claim("failures of the server in its log", len(raw["errors_logged"]), 0, "lines", "at_most"),
        Claim.ratio(
            "Rank calls answered completely afterwards", ranks.get(OK, 0), sum(ranks.values()), 1.0, "at_least"
        ),
        Claim("what the server holds more of than before", len(more), 0, "kinds", "at_most"),
    )
    summary: dict[str, float | None] = {"cases": raw["cases"], "seconds": raw["seconds"]}
    summary |= {f"{name}, more than before": count for name, count in more.items()}
    summary |= {name: raw["outcomes"][name] for name in sorted(raw["outcomes"])}
    return Conclusion(summary, claims)
