"""The installed command as a real process: start, answer, drain on a signal, fail with a message."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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


def test_model_commands_publish_list_show_verify_and_label(tmp_path):
    from tests import tiny

    store = str(tmp_path / "store")
    for version in (1, 2):
        tiny.write_tiny_bundle(tmp_path / str(version), version)
        assert pinrank("model", "publish", str(tmp_path / str(version)), "--store", store).returncode == 0
    assert "tiny@2 is good" in pinrank("model", "verify", str(tmp_path / "2")).stdout
    assert pinrank("model", "label", "tiny", "stable", "2", "--store", store).returncode == 0
    assert "stable" in pinrank("model", "list", "--store", store).stdout
    assert '"save"' in pinrank("model", "show", "tiny", "1", "--store", store).stdout
    refused = pinrank("model", "label", "tiny", "stable", "9", "--store", store)
    assert refused.returncode == 1
    assert "no version 9" in refused.stderr


def test_two_processes_share_a_port_replace_one_that_dies_and_drain_together(model_store, feature_store_url):
    command = [
        PINRANK, "serve", "--model-store", str(model_store), "--model", "tiny", "--processes", "2",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    environment = {**os.environ, "PINRANK_NEAR_CACHE_BYTES": "100000"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            address = serving_address(parent)
            assert serving_address(parent) == address
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            servers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            assert len(servers) == 2
            os.kill(int(servers[0]), signal.SIGKILL)
            events = [json.loads(line)["event"] for line in iter_until(parent.stderr, "serving")]
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
    assert "is another server there?" in refused.stderr


def test_help_teaches_every_command():
    shown = pinrank("--help").stdout
    assert all(command in shown for command in ("serve", "rank", "model", "train", "evaluate", "load"))
