"""Tuned, retuned and served, each by the real command in a process of its own; and retunes that are killed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np

from model_store.model.selection import select
from model_store.model.utility import load_utility, weighted_sum
from model_store.registry.store import ModelStore, open_model_store
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests import tiny
from tests.ranker.tuning.logged import join_answers, publish_tiny
from tests.server.rollout.test_swap_kills import PINRANK, start, until


def pinrank(*arguments: str | Path) -> str:
    done = subprocess.run([PINRANK, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def explained(address: str) -> ranking_pb2.RankResponse:
    request = ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, 31), surface="home", explain=True)
    with grpc.insecure_channel(address) as channel:
        answer: ranking_pb2.RankResponse = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=20)
    return answer


def test_a_running_server_serves_the_retuned_version_with_its_weights_and_the_same_probabilities(
    tmp_path: Path, feature_store_url: str
) -> None:
    store = publish_tiny(tmp_path)
    store.set_label("tiny", "stable", 1)
    join_answers(tmp_path / "joined")
    models, table = tmp_path / "models", tmp_path / "utility.toml"
    pinrank(
        "tune", "--model", "tiny@stable", "--store", models, "--on", tmp_path / "joined", "--at-least", "creator=+5%",
        "--out", table,
    )  # fmt: skip
    weights = load_utility(table.read_bytes(), tiny.manifest()).surfaces["home"].weights
    assert weights[1] > 0.6
    with start(models, feature_store_url) as server:
        address = until(server, lambda event: event["event"] == "serving")["grpc"]
        before = explained(address)
        pinrank("model", "retune", "tiny", "stable", "--utility", table, "--label", "stable", "--store", models)
        until(server, lambda event: event.get("model") == "tiny@2" and event.get("phase") == "serving")
        after = explained(address)
        server.terminate()
        server.wait(30)
        server.stderr.read()
    assert [answer.versions.model_version for answer in (before, after)] == [1, 2]
    assert after.versions.model_digest == store.release("tiny", 2).digest

    def by_pin(answer: ranking_pb2.RankResponse, values: Sequence[float]) -> np.ndarray:
        return np.reshape(values, (30, -1))[np.argsort(answer.pin_ids)]

    old, new = (by_pin(answer, answer.explanation.head_probabilities) for answer in (before, after))
    np.testing.assert_array_equal(old, new)
    old, new = (by_pin(answer, answer.explanation.party_utilities) for answer in (before, after))
    np.testing.assert_array_equal(old, new)
    expected = weighted_sum(new, weights)
    assert after.pin_ids == (select(expected) + 1).tolist()
    np.testing.assert_allclose(by_pin(after, after.utilities)[:, 0], expected, rtol=1e-6)
    assert list(after.pin_ids) != list(before.pin_ids)


def blobs(store: ModelStore) -> int:
    return len(list(Path(store.where.removeprefix("file://")).glob("tiny/blobs/*")))


def test_a_retune_that_is_killed_leaves_the_store_whole_and_can_be_repeated(tmp_path: Path) -> None:
    store = publish_tiny(tmp_path)
    store.set_label("tiny", "canary", 1)
    (tmp_path / "utility.toml").write_text(tiny.UTILITY.replace("creator = 0.5", "creator = 0.7"))
    command = [
        PINRANK, "model", "retune", "tiny", "1", "--utility", str(tmp_path / "utility.toml"), "--label", "canary",
        "--store", str(tmp_path / "models"), "--engine", "numpy",
    ]  # fmt: skip
    start_blobs = blobs(store)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        while killed.poll() is None and blobs(store) == start_blobs:
            pass
        killed.send_signal(signal.SIGKILL)
    after = open_model_store(tmp_path / "models")
    for version in after.versions("tiny"):
        after.read("tiny", version)
    assert after.labels("tiny")["canary"] in after.versions("tiny")
    assert f"published tiny@{after.state('tiny').next_version()}" in pinrank(*command[1:])
    assert after.labels("tiny")["canary"] == max(after.versions("tiny"))
