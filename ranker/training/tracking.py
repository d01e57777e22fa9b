"""Sends the metrics of a training to TensorBoard or MLflow on request. Neither is imported otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from feature_client.redaction import hidden, redacted, secrets_of
from ranker.errors import TrackingError
from ranker.training.progress import Epoch, Step, Watcher

#: A tracker receives only every so many steps.
STEPS_APART = 20
#: By default MLflow's client sends telemetry and retries a dead server for minutes. The environment overrides these.
_MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class _Send(Protocol):
    def __call__(self, values: Mapping[str, float], step: int) -> None: ...


class Tracker:
    """A watcher that sends progress as named values; the names are the same for every tracker.

    If sending fails, the tracker stops with a note: losing metrics is better than losing the training.
    """

    def __init__(self, send: _Send, note: Callable[[str], None]) -> None:
        self._sink: _Send | None = send
        self._note = note
        self._done = 0

    def step(self, step: Step) -> None:
        self._done = step.done
        if step.done % STEPS_APART == 0 or step.done == step.total:
            values = {
                "train/loss": step.loss,
                "train/learning_rate": step.learning_rate,
                "train/rows_per_s": step.rows_per_s,
            }
            self._send(values, step.done)

    def epoch(self, epoch: Epoch) -> None:
        by_head = {f"validation/loss_{head}": loss for head, loss in epoch.validation_losses.items()}
        values = {"train/epoch_loss": epoch.train_loss, "validation/loss": epoch.validation_loss, **by_head}
        if epoch.utility_order is not None:
            values["validation/utility_order"] = epoch.utility_order
        self._send(values, self._done)

    def _send(self, values: Mapping[str, float], step: int) -> None:
        if self._sink is None:
            return
        try:
            self._sink(values, step)
        except (TrackingError, OSError) as error:
            self._sink = None
            self._note(f"metrics tracking has stopped: {error}")


@contextmanager
def tracked(
    tensorboard: Path | None,
    mlflow: str | None,
    experiment: str,
    settings: Mapping[str, str],
    note: Callable[[str], None],
) -> Iterator[tuple[Watcher, ...]]:
    """Open the requested trackers, and close them at the end.

    Args:
        tensorboard: folder for event files, or None.
        mlflow: URI of a tracking server or database, or None.
        experiment: name of the MLflow experiment; each training is one run of it.
        settings: settings of the training, shown with its metrics.
        note: receives a message when a tracker stops.

    Raises:
        ModuleNotFoundError: the package of a tracker is not installed.
        TrackingError: a tracker cannot be reached.
    """
    with ExitStack() as opened:
        watchers: list[Watcher] = []
        if tensorboard is not None:
            watchers.append(opened.enter_context(_tensorboard(tensorboard, settings, note)))
        if mlflow is not None:
            watchers.append(opened.enter_context(_mlflow(mlflow, experiment, settings, note)))
        yield tuple(watchers)


@contextmanager
def _tensorboard(folder: Path, settings: Mapping[str, str], note: Callable[[str], None]) -> Iterator[Watcher]:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - needs the tensorboard package

    with SummaryWriter(str(folder)) as writer:
        writer.add_text("settings", "\n".join(f"    {name} = {value}" for name, value in settings.items()))

        def send(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield Tracker(send, note)


@contextmanager
def _mlflow(uri: str, experiment: str, settings: Mapping[str, str], note: Callable[[str], None]) -> Iterator[Watcher]:
    for name, value in _MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # noqa: PLC0415 - optional
    from mlflow.entities import Metric, Param  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    @contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except MlflowException as error:
            raise TrackingError(f"MLflow at {redacted(uri)}: {hidden(str(error), secrets_of(uri))}") from None

    with explained():
        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known is not None else client.create_experiment(experiment)
        run = client.create_run(number).info.run_id
        client.log_batch(run, params=[Param(name, value) for name, value in settings.items()])

    def send(values: Mapping[str, float], step: int) -> None:
        now_ms = time.time_ns() // 1_000_000
        with explained():
            client.log_batch(run, metrics=[Metric(name, value, now_ms, step) for name, value in values.items()])

    status = "FAILED"
    try:
        yield Tracker(send, note)
        status = "FINISHED"
    finally:
        try:
            with explained():
                client.set_terminated(run, status)
        except TrackingError as error:
            note(f"the MLflow run could not be closed: {error}")
