"""Metrics reach TensorBoard's files and an MLflow store; a tracker that fails costs no training."""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ranker.errors import TrackingError
from ranker.training.progress import Epoch, Step, Watcher
from ranker.training.tracking import STEPS_APART, Tracker, tracked

SETTINGS = {"variant": "early", "seed": "7"}
NAMES = {
    "train/loss", "train/learning_rate", "train/rows_per_s", "train/epoch_loss",
    "validation/loss", "validation/loss_save", "validation/loss_hide",
    "validation/utility_order",
}  # fmt: skip


def train_a_little(watcher: Watcher) -> None:
    for done in range(1, STEPS_APART + 2):
        watcher.step(Step(1, done, STEPS_APART + 1, loss=1 / done, learning_rate=0.25, rows_per_s=100.0))
    watcher.epoch(Epoch(1, 0.5, 0.75, {"save": 0.5, "hide": 1.0}, 0.625))


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    with tracked(tmp_path / "runs", None, "toy", SETTINGS, print) as (watcher,):
        train_a_little(watcher)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) == NAMES
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (STEPS_APART, pytest.approx(1 / STEPS_APART)), (STEPS_APART + 1, pytest.approx(1 / (STEPS_APART + 1))),
    ]  # fmt: skip
    assert [(e.step, e.value) for e in events.Scalars("validation/loss_hide")] == [(STEPS_APART + 1, 1.0)]


def test_mlflow_gets_every_metric_as_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "mlflow").as_uri()
    for _ in range(2):
        with tracked(None, uri, "toy", SETTINGS, print) as (watcher,):
            train_a_little(watcher)
    with pytest.raises(KeyboardInterrupt), tracked(None, uri, "toy", SETTINGS, print):
        raise KeyboardInterrupt
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "FINISHED"]
    finished = next(run for run in runs if run.info.status == "FINISHED")
    assert finished.data.params == SETTINGS
    assert set(finished.data.metrics) == NAMES
    assert finished.data.metrics["validation/loss_hide"] == 1.0


def test_an_mlflow_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    uri = (tmp_path / "mlflow").as_uri()
    with pytest.raises(TrackingError, match="MLflow at file:"), tracked(None, uri, "toy", {}, print):
        pass


def test_an_mlflow_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://someone:planted-password@127.0.0.1:1"
    with (
        pytest.raises(TrackingError, match="MLflow at http://127.0.0.1:1: ") as failed,
        tracked(None, uri, "t", {}, print),
    ):
        pass
    assert "planted" not in "".join(traceback.format_exception(failed.value))


def test_a_tracker_that_fails_on_the_way_is_given_up_and_said_so() -> None:
    asked: list[int] = []
    notes: list[str] = []

    def send(values: Mapping[str, float], step: int) -> None:
        asked.append(step)
        raise TrackingError("the server is gone")

    train_a_little(Tracker(send, notes.append))
    assert asked == [STEPS_APART]
    assert notes == ["metrics tracking has stopped: the server is gone"]


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_trackers_are_imported_only_when_asked_for(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == package or name == f"torch.utils.{package}":
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with tracked(None, None, "toy", SETTINGS, print) as watchers:
        assert watchers == ()
    asked = {"tensorboard": (tmp_path, None), "mlflow": (None, "http://127.0.0.1:1")}[package]
    with pytest.raises(ModuleNotFoundError), tracked(*asked, "toy", SETTINGS, print):
        pass
