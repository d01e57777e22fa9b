"""Servers killed while they take a version in: nothing is lost, and the next one serves what the label says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests import tiny
from tests.server.swapping import ALIKE, own_golden

PINRANK = str(Path(sys.executable).with_name("pinrank"))


def start(store, features):
    command = [
        PINRANK, "serve", "--model-store", str(store), "--model", "tiny", "--feature-store", features,
        "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def until(process, wanted):
    for line in process.stderr:
        event = json.loads(line)
        if wanted(event):
            return event
    raise AssertionError(f"the server ended with {process.wait()}")


def rank(address):
    with grpc.insecure_channel(address) as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, 31), surface="home")
        return ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=20)


@pytest.mark.parametrize("phase", ["verifying", "warming", "ready", "serving"])
def test_a_server_killed_during_a_swap_leaves_all_as_it_was_and_its_successor_takes_over(
    phase, tmp_path, feature_store_url
):
    store = open_model_store(tmp_path / "models")
    for version in (1, 2):
        tiny.write_tiny_bundle(tmp_path / str(version), version, **own_golden(ALIKE))
        store.publish(tmp_path / str(version))
    store.set_label("tiny", "stable", 1)
    before = store.head("tiny").number
    with start(tmp_path / "models", feature_store_url) as killed:
        address = until(killed, lambda e: e["event"] == "serving")["grpc"]
        assert rank(address).versions.model_version == 1
        store.set_label("tiny", "stable", 2)
        until(killed, lambda e: e.get("model") == "tiny@2" and e.get("phase") == phase)
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        killed.stderr.read()  # until its helper process has ended too
    assert open_model_store(tmp_path / "models").head("tiny").number == before + 1
    for version in (1, 2):
        store.read("tiny", version)
    with start(tmp_path / "models", feature_store_url) as successor:
        address = until(successor, lambda e: e["event"] == "serving")["grpc"]
        answer = rank(address)
        assert answer.versions.model_version == 2
        assert answer.versions.model_digest == store.release("tiny", 2).digest
        successor.terminate()
        successor.wait(30)
        successor.stderr.read()
