"""Secrets and users' data, planted wherever a server holds them, and hostile calls that make it fail: nothing leaks."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pinrank.v1 import activity_pb2, models_pb2, ranking_pb2
from server.telemetry.log_limits import LINE_BYTES_MAX
from tests import tiny
from tests.scripted_redis import ScriptedRedis, echo, echoing_error, honest, on_a_thread, wrong_type

PINRANK = str(Path(sys.executable).with_name("pinrank"))
#: What only the server knows.
SECRETS = {
    "token": "planted-admin-token-5c1f",
    "redis user": "planted-redis-user-77aa",
    "redis password": "planted-redis-password-0d9e",
    "access key": "PLANTEDACCESSKEY4242",
    "secret key": "planted/secret+key/9b31",
    "session token": "planted-session-token-e80c",
}
#: What callers send, and no log may keep: ids, words, a token of something else.
USER, PIN, EVENT = 7_771_234_567_890_123_451, 8_881_234_567_890_123_452, 6_661_234_567_890_123_453
CALLERS = {
    "user": str(USER),
    "pin": str(PIN),
    "event": str(EVENT),
    "word": "planted-word-of-a-caller",
    "wrong token": "planted-wrong-token-of-a-caller",
}
TINY_DEADLINES_S = (0.0003, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.02)


@dataclass
class Running:
    """A server process, all that it wrote, and all that callers were told."""

    process: subprocess.Popen[str]
    redis: ScriptedRedis
    lines: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    arrived: queue.Queue[str] = field(default_factory=queue.Queue)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in map(plain, self.process.stderr):
            self.lines.append(line)
            self.arrived.put(line)
        self.arrived.put("")

    def await_line(self, pattern: str) -> re.Match[str]:
        while line := self.arrived.get(timeout=60):
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the server ended: {self.lines}")


def plain(line: str) -> str:
    """Return a line without its colors."""
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


@contextlib.contextmanager
def serving(model_store, tmp_path, form: str) -> Iterator[Running]:
    token = tmp_path / "token"
    token.write_text(SECRETS["token"] + "\n")
    credentials = f"{SECRETS['redis user']}:{SECRETS['redis password']}"
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny", "--grpc-port", "0", "--http-port", "0"
    ]  # fmt: skip
    with on_a_thread(ScriptedRedis(honest(tiny.features()))) as redis:
        environment = os.environ | {
            "PINRANK_FEATURE_STORE": f"redis://{credentials}@127.0.0.1:{redis.port}/0",
            "PINRANK_ADMIN_TOKEN_FILE": str(token),
            "PINRANK_RECORD_ACTIONS": "true",
            "PINRANK_LOG_FORMAT": form,
            "PINRANK_NEAR_CACHE_BYTES": "0",
            "AWS_ACCESS_KEY_ID": SECRETS["access key"],
            "AWS_SECRET_ACCESS_KEY": SECRETS["secret key"],
            "AWS_SESSION_TOKEN": SECRETS["session token"],
        }
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            running = Running(process, redis)
            reader = threading.Thread(target=running.read)
            reader.start()
            try:
                yield running
            finally:
                process.kill()
                reader.join()


def call(running: Running, method, request: bytes, timeout_s: float = 10, metadata=()):
    """Make a call over raw bytes, and note all that the caller hears of it."""
    try:
        answer, made = method.with_call(request, timeout=timeout_s, metadata=metadata)
    except grpc.RpcError as error:
        made, answer = error, b""
        running.told.append(repr(error))
    running.told += [str(made.details()), repr(made.initial_metadata()), repr(made.trailing_metadata())]
    running.told.append(answer.decode("latin-1"))
    return made.code()


def at_once(running: Running, calls) -> None:
    """Make so many calls of each kind together that many of their callers are gone when their statuses are sent."""
    made = [
        method.future(request, timeout=deadline_s, metadata=metadata)
        for _ in range(60)
        for deadline_s in TINY_DEADLINES_S
        for method, request, metadata in calls
    ]
    for one in made:
        error = one.exception()
        running.told += [repr(error), str(one.details()), repr(one.trailing_metadata())]


def hostile_connections(port: int) -> None:
    """Send what no gRPC client sends: another protocol, bytes without meaning, a farewell with a text of one's own."""
    word = CALLERS["word"].encode()
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings, farewell = _frame(4, b""), _frame(7, bytes(7) + b"\x02" + word + b"\nforged line")
    for sent in (b"GET /" + word + b" HTTP/1.1\r\n\r\n", preface + word * 100, preface + settings + farewell):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while connection.recv(4_096):
                    continue


def _frame(kind: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame of the whole connection."""
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


def hostile_calls(running: Running, channel: grpc.Channel) -> None:
    def method(name: str):
        return channel.unary_unary(name)

    rank, record = method("/pinrank.v1.RankingService/Rank"), method("/pinrank.v1.ActivityService/Record")
    status, load = (method(f"/pinrank.v1.ModelService/{name}") for name in ("Status", "Load"))
    wrong = (("authorization", f"Bearer {CALLERS['wrong token']}"),)
    right = (("authorization", f"Bearer {SECRETS['token']}"),)
    good_rank = ranking_pb2.RankRequest(user_id=USER, pin_ids=[PIN, 1, 2], surface="home").SerializeToString()
    named = ranking_pb2.RankRequest(user_id=USER, pin_ids=[PIN, PIN], surface=CALLERS["word"], label=CALLERS["word"])
    unknown = activity_pb2.Action(event_id=EVENT, user_id=USER, pin_id=PIN, action=CALLERS["word"], surface="home")
    known = activity_pb2.Action(
        event_id=EVENT, user_id=USER, pin_id=PIN, action=tiny.ACTIONS.actions[0], surface="home",
        time_ms=int(time.time() * 1e3),
    )  # fmt: skip
    good_record = activity_pb2.RecordRequest(actions=[known]).SerializeToString()
    bad_record = activity_pb2.RecordRequest(actions=[unknown] * 50).SerializeToString()
    garbage = CALLERS["word"].encode() + b"\xff\xff\xff"
    assert call(running, rank, good_rank) == grpc.StatusCode.OK
    assert call(running, status, b"", metadata=right) == grpc.StatusCode.OK
    for answer in (honest(tiny.features()), echoing_error, echo, wrong_type):
        running.redis.answer = answer
        for deadline_s in TINY_DEADLINES_S * 3:
            call(running, status, b"", deadline_s, wrong)
            call(running, load, models_pb2.LoadRequest(version=9).SerializeToString(), deadline_s, right)
            call(running, rank, good_rank, deadline_s)
            call(running, rank, named.SerializeToString(), deadline_s)
            call(running, record, good_record, deadline_s)
            call(running, record, bad_record, deadline_s)
        for one in (good_record, bad_record):
            call(running, record, one)
        call(running, rank, good_rank)
    at_once(running, [(status, b"", wrong), (rank, named.SerializeToString(), ()), (record, bad_record, ())])
    assert call(running, status, b"", metadata=wrong) == grpc.StatusCode.UNAUTHENTICATED
    assert call(running, rank, named.SerializeToString()) == grpc.StatusCode.INVALID_ARGUMENT
    assert call(running, record, bad_record) == grpc.StatusCode.INVALID_ARGUMENT
    for broken in (rank, record, status, load, method("/grpc.health.v1.Health/Check")):
        assert call(running, broken, garbage, metadata=right) == grpc.StatusCode.INVALID_ARGUMENT
    for name in ("/pinrank.v1.RankingService/Drop", f"/{CALLERS['word']}/Rank"):
        assert call(running, method(name), good_rank, metadata=right) == grpc.StatusCode.UNIMPLEMENTED
    huge = tuple((f"x-{CALLERS['word']}-{i}", CALLERS["word"] * 200) for i in range(20))
    assert call(running, rank, good_rank, metadata=huge) != grpc.StatusCode.OK
    running.redis.answer = honest(tiny.features())
    healthy = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert healthy.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("form", ["json", "console"])
def test_hostile_calls_bring_no_secret_and_no_user_data_to_light(form, model_store, tmp_path):
    with serving(model_store, tmp_path, form) as running:
        http = running.await_line(r"http\"?\W+(127\.0\.0\.1:\d+)")[1]
        address = re.search(r"grpc\"?\W+(127\.0\.0\.1:\d+)", "".join(running.lines))[1]
        with grpc.insecure_channel(address) as channel:
            hostile_calls(running, channel)
        hostile_connections(int(address.rpartition(":")[2]))
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
    log, told = "".join(running.lines), "\n".join(running.told)
    for name, secret in SECRETS.items():
        for where, text in (("log", log), ("metrics", metrics), ("answers", told)):
            assert secret not in text, f"the {name} is in the {where}: {_around(secret, text)}"
    for name, value in CALLERS.items():
        for where, text in (("log", log), ("metrics", metrics)):
            assert value not in text, f"the {name} is in the {where}: {_around(value, text)}"
    assert max(len(line.encode()) for line in running.lines) <= LINE_BYTES_MAX + 1
    # Calls without the token are logged, and too many: how many lines that left out is said at the very end.
    assert "stopped" in [line for line in running.lines if "log_lines_withheld" not in line][-1]
    if form == "json":
        events = [json.loads(line) for line in running.lines]
        assert {event["event"] for event in events if event["level"] == "error"} <= {"request_failed"}
        assert not [event for event in events if event["event"] == "library"]


def _around(value: str, text: str) -> str:
    at = text.index(value)
    return text[max(0, at - 300) : at + 300].replace(value, "<HERE>")
