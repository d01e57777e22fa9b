"""A machine that has another engine and no OpenVINO: commands, servers and the processes that prove for them."""

from __future__ import annotations

import json
import signal
import subprocess

import grpc
import pytest

from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests.conftest import needs_training
from tests.server.test_processes import PINRANK, pinrank, serving_address


@pytest.fixture
def without_openvino(tmp_path, monkeypatch):
    """Let no process of a test import OpenVINO, nor those that it starts."""
    package = tmp_path / "no-openvino/openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


@pytest.fixture
def command(model_store, feature_store_url):
    return (
        "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["numpy", pytest.param("torch", marks=needs_training)])
def test_a_server_with_another_engine_starts_proves_and_serves(without_openvino, command, monkeypatch, engine):
    monkeypatch.setenv("PINRANK_ENGINE", engine)
    with subprocess.Popen([PINRANK, *command], stderr=subprocess.PIPE, text=True) as server:
        try:
            address = serving_address(server)
            with grpc.insecure_channel(address) as channel:
                request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
                answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=10)
            assert sorted(answer.pin_ids) == [1, 2, 3]
            server.send_signal(signal.SIGTERM)
            assert [json.loads(line)["event"] for line in server.stderr] == ["draining", "stopped"]
        finally:
            server.kill()


def test_a_server_and_commands_that_need_it_say_what_to_install(without_openvino, command, model_store):
    for arguments in (command, ("model", "verify", "tiny", "stable", "--store", str(model_store))):
        refused = pinrank(*arguments)
        assert refused.returncode == 1
        assert "error: engine 'openvino' lacks openvino; pip install openvino" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_version_is_verified_by_another_engine(without_openvino, model_store):
    verified = pinrank("model", "verify", "tiny", "stable", "--store", str(model_store), "--engine", "numpy")
    assert "tiny@1 passes every check" in verified.stdout
