"""The HTTP port of several server processes, and of one with few descriptors: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests.server.web.exchange import fetch, idle_connections, lines, many_descriptors

PINRANK = str(Path(sys.executable).with_name("pinrank"))


@contextlib.contextmanager
def serving(model_store, feature_store_url, *options, before=(), processes=1, **variables):
    """Run a server; yield its process, its address and its HTTP port."""
    command = [
        *before, PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0", *options,
    ]  # fmt: skip
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            events = [until(running, "serving") for _ in range(processes)]
            assert len({(event["grpc"], event["http"]) for event in events}) == 1
            yield running, events[0]["grpc"], int(events[0]["http"].rpartition(":")[2])
        finally:
            running.kill()


def until(running, event):
    for line in running.stderr:
        if (found := json.loads(line))["event"] == event:
            return found
    raise AssertionError(f"the server ended with {running.wait()}")


def rank(address):
    """Make one call on a connection of its own."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
        answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=30, wait_for_ready=True)
    assert sorted(answer.pin_ids) == [1, 2, 3]


def scrape(port):
    status, body, _ = fetch(port, "/metrics")
    assert status == 200
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


ANSWERED = "pinrank_requests_total", "code=OK", "surface=home"


@contextlib.contextmanager
def deadline(seconds=60):
    ends_s = time.monotonic() + seconds

    def left():
        assert time.monotonic() < ends_s
        time.sleep(0.05)  # a start at low priority needs the core that polling would take
        return True

    yield left


@pytest.fixture
def two(model_store, feature_store_url):
    fresh = {"PINRANK_HTTP__METRICS_AGE_S_MAX": "0"}
    with serving(model_store, feature_store_url, "--processes", "2", processes=2, **fresh) as found:
        yield found


def servers_of(parent):
    found = [int(child) for child in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_one_page_sums_two_processes_and_a_killed_one_lowers_no_counter(two):
    parent, address, port = two
    for _ in range(16):  # new connections, some to each
        rank(address)
    found = scrape(port)
    assert found[ANSWERED] == 16
    assert found["pinrank_request_seconds_count", "surface=home"] == 16
    assert {found["pinrank_requests_in_flight", f"process={number}"] for number in range(2)} == {0}
    assert {found["pinrank_process_up", f"process={number}"] for number in range(2)} == {1}
    for deaths, killed in enumerate(servers_of(parent), 1):
        os.kill(killed, signal.SIGKILL)
        with deadline() as left:
            while left():
                found = scrape(port)
                assert found[ANSWERED] == 16
                restarts = sum(found["pinrank_process_restarts_total", f"process={number}"] for number in range(2))
                up = sum(found["pinrank_process_up", f"process={number}"] for number in range(2))
                if (restarts, up) == (deaths, 2):
                    break
        until(parent, "serving")
    rank(address)
    assert scrape(port)[ANSWERED] == 17


def test_two_processes_are_ready_while_one_starts_again_and_not_alive_while_one_hangs(two):
    parent, _, port = two
    assert lines(port, "/startupz") == (200, ["started"])
    assert lines(port, "/livez") == (200, ["alive"])
    assert lines(port, "/readyz") == (200, ["ready", "process 0: ready", "process 1: ready"])
    status, said = lines(port, "/healthz")
    assert (status, said[0]) == (200, "serving")
    assert {"process 0: serving", "process 1: serving"} <= set(said)
    first, second = servers_of(parent)
    os.kill(first, signal.SIGKILL)
    with deadline() as left:
        while left():
            status, said = lines(port, "/readyz")
            assert (status, said[0]) == (200, "ready")
            if said[1:] == ["process 0: ready", "process 1: ready"]:
                break
    os.kill(second, signal.SIGSTOP)
    try:
        with deadline() as left:
            while left():
                status, said = lines(port, "/livez")
                if status == 503:
                    break
        assert said == ["not alive", "process 1: no answer within 0.75 s"]
        assert lines(port, "/readyz")[0] == 503
        assert lines(port, "/startupz") == (200, ["started"])
    finally:
        os.kill(second, signal.SIGCONT)
    with deadline() as left:
        while left() and lines(port, "/livez")[0] != 200:
            pass


@pytest.mark.parametrize("sent", [b"", b"G"], ids=["nothing", "a byte"])
def test_two_thousand_idle_http_connections_under_few_descriptors_leave_probes_and_rank_answering(
    model_store, feature_store_url, sent
):
    few = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh"]
    with (
        serving(model_store, feature_store_url, before=few, PINRANK_HTTP__REQUEST_S_MAX="60") as (_, address, port),
        many_descriptors(),
        idle_connections(port, 2_000, sent),
    ):
        for _ in range(20):
            assert lines(port, "/livez") == (200, ["alive"])
            rank(address)


def test_a_taken_http_port_is_named_before_any_process_starts(model_store, feature_store_url, two):
    _, _, port = two
    refused = subprocess.run(
        [
            PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny", "--processes", "2",
            "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", str(port),
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "set http_port to another port" in " ".join(refused.stderr.split())
