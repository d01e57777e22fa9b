"""The installed command as a real process: start, answer, drain on a signal, fail with a message."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kernels.cores import cores
from pinrank.channels import SERVICE_CONFIG
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.processes import end_processes
from tests import processes
from tests.model_store.registry.test_store import signing_key

PINRANK = str(Path(sys.executable).with_name("pinrank"))


def pinrank(*arguments):
    return subprocess.run([PINRANK, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def process(model_store, feature_store_url):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


def serving_address(process):
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == "serving":
            return event["grpc"]
    raise AssertionError(f"the server ended with {process.wait()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_server_answers_and_drains_on_a_signal(process, number):
    address = serving_address(process)
    with grpc.insecure_channel(address) as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
        answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=10)
    assert sorted(answer.pin_ids) == [1, 2, 3]
    process.send_signal(number)
    events = [json.loads(line)["event"] for line in process.stderr]
    assert process.wait() == 0
    assert events == ["draining", "stopped"]


@pytest.mark.parametrize(
    ("arguments", "option", "identifier"),
    [
        (("--user", "listener-1", "--pins", "1"), "--user", "listener-1"),
        (("--user", "1", "--pins", "1,song/17"), "--pins", "song/17"),
        (("--user", "1", "--pins", "1", "--query-pin", "song 4"), "--query-pin", "'song 4'"),
        (("--user", "18446744073709551616", "--pins", "1"), "--user", "18446744073709551616"),
        (("--user", "1", "--pins", "1,-2"), "--pins", "-2"),
    ],
)
def test_an_identifier_of_the_data_leads_to_its_id(arguments, option, identifier):
    refused = pinrank("rank", *arguments)
    assert refused.returncode == 1
    assert f"error: {option} " in refused.stderr
    assert f"`pinrank data ids {identifier}`" in refused.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not know these priorities")
def test_engine_streams_compute_behind_the_event_loop(process):
    with grpc.insecure_channel(serving_address(process)) as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
        ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=10)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    threads = [int(entry.name) for entry in Path(f"/proc/{process.pid}/task").iterdir()]
    nicer = [thread for thread in threads if os.getpriority(os.PRIO_PROCESS, thread) == own + 5]
    assert len(nicer) == cores()
    assert process.pid not in nicer


def test_rank_command_shows_the_answer_and_explains_refusals(process):
    address = serving_address(process)
    shown = pinrank("rank", "--user", "1", "--pins", "1,2,3", "--address", address)
    assert shown.returncode == 0
    assert "probability of each action" in shown.stdout
    assert "degraded: nothing" in shown.stdout
    answer = json.loads(pinrank("rank", "--user", "1", "--pins", "3,2", "--address", address, "--json").stdout)
    assert sorted(answer["pin_ids"]) == ["2", "3"]
    refused = pinrank("rank", "--user", "1", "--pins", "1", "--surface", "shop", "--address", address)
    assert refused.returncode == 1
    assert "INVALID_ARGUMENT: surface: unknown surface 'shop'" in " ".join(refused.stderr.split())


def test_rank_without_a_server_says_how_to_start_one():
    refused = pinrank("rank", "--user", "1", "--pins", "1", "--address", "127.0.0.1:1")
    assert refused.returncode == 1
    assert "pinrank serve" in refused.stderr


def test_serve_names_what_is_missing():
    refused = pinrank("serve", "--model", "tiny")
    assert refused.returncode == 1
    assert "model_store: Field required" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_serve_names_a_key_that_is_none_and_a_version_that_nobody_signed(model_store, tmp_path, monkeypatch):
    _, public = signing_key(tmp_path, "anna")
    (tmp_path / "none.pem").write_text("no key")
    serve = ("serve", "--model-store", str(model_store), "--model", "tiny", "--feature-store", "memory://")
    for key, message in ((tmp_path / "none.pem", "none.pem is not a PEM public key"), (public, "tiny@1 is not signed")):
        monkeypatch.setenv("PINRANK_SWAP__TRUSTED_KEYS", json.dumps([str(key)]))
        refused = pinrank(*serve, "--grpc-port", "0", "--http-port", "0")
        assert refused.returncode == 1
        assert f"error: {message}" in refused.stderr.replace(f"{tmp_path}/", "")
        assert "Traceback" not in refused.stderr


def test_model_commands_publish_list_show_verify_and_label(tmp_path):
    from tests import tiny

    store = str(tmp_path / "store")
    for version in (1, 2):
        tiny.write_tiny_bundle(tmp_path / str(version), version)
        assert pinrank("model", "publish", str(tmp_path / str(version)), "--store", store).returncode == 0
    assert "tiny@2 passes every check" in pinrank("model", "verify", str(tmp_path / "2")).stdout
    assert pinrank("model", "label", "tiny", "stable", "2", "--store", store).returncode == 0
    assert "stable" in pinrank("model", "list", "--store", store).stdout
    assert '"save"' in pinrank("model", "show", "tiny", "1", "--store", store).stdout
    refused = pinrank("model", "label", "tiny", "stable", "9", "--store", store)
    assert refused.returncode == 1
    assert "no version 9" in refused.stderr


def servers_of(parent):
    started = processes.children(parent.pid)
    return [pid for pid in started if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def others_folder(tmp_path):
    """A folder that holds somebody else's modules, by names of ours and of the standard library."""
    for name in ("model_store", "kernels", "server", "feature_client", "pinrank", "signal", "queue"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name} from here')")
    return tmp_path


def test_servers_started_anywhere_whose_parent_is_killed_drain_and_leave_the_port_and_no_process(
    model_store, feature_store_url, others_folder
):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny", "--processes", "2",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=others_folder) as parent:
        address = serving_address(parent)
        assert serving_address(parent) == address
        everybody = processes.family(parent.pid)
        assert len(everybody) >= 5  # the parent, two servers, and the helper of each
        with processes.ends_of(everybody):
            parent.kill()
            events = [json.loads(line)["event"] for line in parent.stderr]
    assert sorted(events) == sorted(["parent_died", "draining", "stopped"] * 2)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_a_signal_during_the_start_ends_it(model_store, feature_store_url):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as starting:
        assert json.loads(starting.stderr.readline())["phase"] == "verifying"
        starting.send_signal(signal.SIGTERM)
        events = [json.loads(line)["event"] for line in starting.stderr]
        assert starting.wait() == 0
    assert events[-1] == "stopped_during_start"
    assert "serving" not in events


def calls_until(address, calling, ended):
    """Rank again and again on a connection of its own, as a frontend that makes calls again; the statuses."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.service_config", json.dumps(SERVICE_CONFIG))]
    found = []
    with grpc.insecure_channel(address, options) as channel:
        rank = ranking_pb2_grpc.RankingServiceStub(channel).Rank
        while not ended.is_set():
            try:
                rank(ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home"), timeout=10)
                found.append("OK")
            except grpc.RpcError as error:
                found.append(f"{error.code().name}: {error.details()}")
            if len(found) == 20:
                calling.release()
    return found


def test_a_server_bears_closed_streams_and_a_log_that_nobody_reads_any_more(model_store, feature_store_url):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip

    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    with subprocess.Popen([*closed, *command], stderr=subprocess.PIPE, text=True) as process:
        address = serving_address(process)
        process.stderr.close()
        with grpc.insecure_channel(address) as channel:
            request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
            ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=10)
        process.terminate()
        assert process.wait() == 0


def test_two_processes_share_a_port_replace_one_that_dies_and_lose_no_call_that_is_made_again(
    model_store, feature_store_url
):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny", "--processes", "2",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    environment = {**os.environ, "PINRANK_NEAR_CACHE_BYTES": "100000"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            address = serving_address(parent)
            assert serving_address(parent) == address
            servers = servers_of(parent)
            assert len(servers) == 2
            with ThreadPoolExecutor(8) as callers:
                calling, killed = threading.Semaphore(0), threading.Event()
                statuses = [callers.submit(calls_until, address, calling, killed) for _ in range(8)]
                # Nobody can save a connection that the killed server has not accepted yet.
                assert all(calling.acquire(timeout=30) for _ in range(8))
                os.kill(servers[0], signal.SIGKILL)
                events = [json.loads(line)["event"] for line in iter_until(parent.stderr, "serving")]
                killed.set()
            assert {status for one in statuses for status in one.result()} == {"OK"}
            assert "process_died" in events
            for _ in range(8):  # new connections, some to each
                with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                    request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
                    answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=10)
                    assert sorted(answer.pin_ids) == [1, 2, 3]
            parent.send_signal(signal.SIGTERM)
            events = [json.loads(line)["event"] for line in parent.stderr]
            assert parent.wait() == 0
            assert sorted(events) == ["draining", "draining", "stopped", "stopped"]
        finally:
            parent.kill()


def iter_until(lines, event):
    """The lines up to the first one about this event."""
    for line in lines:
        yield line
        if json.loads(line)["event"] == event:
            return


def stubborn(ready):
    """Ends when it is hurried only."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
    ready.send("ready")
    while True:
        signal.pause()


@pytest.mark.parametrize(("heard", "within_s", "exitcode"), [([15, 2], 60, 7), ([2, 2], 60, 7), ([2, 15], 0.01, -9)])
def test_impatience_is_passed_on_to_servers_that_drain_and_the_rest_is_killed(heard, within_s, exitcode):
    context = multiprocessing.get_context("spawn")
    reader, ready = context.Pipe(duplex=False)
    process = context.Process(target=stubborn, args=(ready,))
    process.start()
    assert reader.recv() == "ready"
    signals, parent = socket.socketpair()
    with signals, parent:
        parent.send(bytes(heard))
        end_processes([process], signals, within_s)
    assert process.exitcode == exitcode


def test_processes_that_cannot_serve_end_the_command_with_the_reason(model_store):
    command = ["serve", "--model-store", str(model_store), "--model", "nowhere", "--processes", "2"]
    refused = pinrank(*command, "--feature-store", "memory://", "--grpc-port", "0", "--http-port", "0")
    assert refused.returncode == 1
    assert "cannot_serve" in refused.stderr
    assert "its log says why" in refused.stderr


def test_a_second_server_on_a_shared_port_is_refused(model_store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = ["serve", "--model-store", str(model_store), "--model", "tiny", "--processes", "2"]
        refused = pinrank(*command, "--feature-store", "memory://", "--grpc-port", port)
    assert refused.returncode == 1
    assert "is another server using it?" in refused.stderr


def test_help_teaches_every_command():
    shown = pinrank("--help").stdout
    assert all(command in shown for command in ("serve", "rank", "model", "train", "evaluate", "load"))
