"""The options of `pinrank train`, a class for each panel of its help, and the settings that they stand for.

Serving installs lack PyTorch, so whatever needs it is imported when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranker.cli.console import ActionsOption, DataOption, fail
from ranker.cli.options import OptionGroup
from ranker.cli.places import check_folder, check_new_folder
from ranker.errors import SettingError
from ranker.network.variants import VARIANTS, parse_sizes

if TYPE_CHECKING:
    from model_store.registry.store import ModelStore
    from ranker.evaluation.gates import Gates
    from ranker.training.checkpoint import CheckpointPlan
    from ranker.training.examples import Sampling
    from ranker.training.parent import Parent
    from ranker.training.settings import TrainingConfig

#: What is trained already is only to be moved a little.
_RATE, _RATE_ON = 2e-3, 5e-4
_VARIANTS = "; ".join(f"[bold]{name}[/]: {variant.description}" for name, variant in VARIANTS.items())


@dataclass(frozen=True, slots=True)
class BundleOptions(OptionGroup):
    panel = "The bundle"

    utility: Annotated[
        Path | None, typer.Option(help="The utility table (TOML) to put into the bundle; the parent's without.")
    ] = None
    name: Annotated[str, typer.Option(help="Name of the model.")] = "ml1m"
    version: Annotated[
        int | None,
        typer.Option(min=1, help="Version to publish as; versions never change. The next free one without."),
    ] = None
    publish: Annotated[bool, typer.Option("--publish", help="Publish into --store (as without --out).")] = False
    store: Annotated[str | None, typer.Option("--store", help="The model store: a folder, or s3://bucket/prefix.")] = (
        None
    )
    label: Annotated[str | None, typer.Option(help="Label to point at the new version; needs --store.")] = None
    out: Annotated[Path | None, typer.Option(help="Write the bundle into this new folder.")] = None

    def open_store(self) -> ModelStore | None:
        from model_store.registry.store import open_model_store  # noqa: PLC0415

        return None if self.store is None else open_model_store(self.store)

    def utility_table(self, parent: Parent | None) -> bytes:
        """Read the utility table; without one, the parent's."""
        from model_store.bundle.files import UTILITY  # noqa: PLC0415

        if self.utility is not None:
            return self.utility.read_bytes()
        return parent.bundle.files[UTILITY] if parent else b""

    def check_places(self, models: ModelStore | None) -> None:
        """Refuse before the work what could not be written, published or labelled after it."""
        from model_store.registry.history import check_label  # noqa: PLC0415

        if self.out is not None:
            check_new_folder(self.out)
        if self.label is not None:
            check_label(self.label)
        if models is not None:
            models.check_writable(self.name)


@dataclass(frozen=True, slots=True)
class ParentOptions(OptionGroup):
    panel = "From a parent"

    parent: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL|VERSION",
            help="Train on from this version of the store, on the events that it has not learned from; it is compared "
            "on the newest of them, and nothing is made that is worse.",
        ),
    ] = None
    gate_auc: Annotated[float, typer.Option(min=0, help="AUC that a head may lose against the parent.")] = 0.005
    gate_hit_percent: Annotated[
        float, typer.Option(min=0, help="Percent of HIT@3 that a head may lose, beyond the interval.")
    ] = 2.0
    gate_ece: Annotated[float, typer.Option(min=0, help="Largest calibration error of a head.")] = 0.02

    def read(self, models: ModelStore | None, name: str) -> Parent | None:
        from ranker.training.parent import Parent  # noqa: PLC0415

        if models is None or self.parent is None:
            return None
        version = int(self.parent) if self.parent.isdigit() else models.resolve(name, self.parent)
        return Parent.of(models.read(name, version))

    def gates(self) -> Gates:
        from ranker.evaluation.gates import Gates  # noqa: PLC0415

        return Gates(self.gate_auc, self.gate_hit_percent, self.gate_ece)


@dataclass(frozen=True, slots=True)
class DataOptions(OptionGroup):
    panel = "Data"

    data: DataOption = "ml-1m"
    actions: ActionsOption = None
    requests_max: Annotated[
        int | None, typer.Option(min=1, help="Learn from about so many requests, drawn evenly; all without.")
    ] = None
    negatives: Annotated[
        int,
        typer.Option(min=1, help="Pins drawn per training request beside those acted on; each costs a row."),
    ] = 24

    def sampling(self) -> Sampling:
        from ranker.training.examples import Sampling  # noqa: PLC0415

        return Sampling(self.negatives, requests_max=self.requests_max)


@dataclass(frozen=True, slots=True)
class NetworkOptions(OptionGroup):
    panel = "Network"

    variant: Annotated[str, typer.Option(help=f"How the network reads the user's last actions. {_VARIANTS}.")] = "early"
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another size of the network, e.g. encoder_layers=1, hidden=256,128 or dropout=0.2; may be repeated. "
            "A name that is not there lists all.",
        ),
    ] = None

    def sizes(self) -> dict[str, object]:
        return parse_sizes(self.size or [])


@dataclass(frozen=True, slots=True)
class TrainingOptions(OptionGroup):
    panel = "Learning"

    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 7
    epochs: Annotated[int, typer.Option(min=1, help="At most so many passes over the training requests.")] = 3
    patience: Annotated[
        int,
        typer.Option(
            min=0, help="Epochs in a row without a better validation loss to wait out; the best weights are kept."
        ),
    ] = 1
    batch_requests: Annotated[
        int,
        typer.Option(min=1, help="Requests per minibatch, each with all its candidates; all ranks together."),
    ] = 48
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Highest learning rate of the schedule (default: {_RATE:g}; from a parent {_RATE_ON:g})."),
    ] = None
    weight_decay: Annotated[float, typer.Option(help="AdamW's decay of weights.")] = 1e-4
    head_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEAD=WEIGHT",
            help="How much a head counts in the loss, 1 for heads that are not named; may be repeated.",
        ),
    ] = None
    time_window_h: Annotated[
        float,
        typer.Option(
            min=0, help="Hide each request's actions younger than a time drawn from 0 to so many hours; 0 hides none."
        ),
    ] = 24.0
    time_window_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that this is done to.")] = (
        1.0
    )

    def config(self, precision: str, *, from_parent: bool) -> TrainingConfig:
        from ranker.training.settings import TrainingConfig, precision_of  # noqa: PLC0415

        default_rate = _RATE_ON if from_parent else _RATE
        return TrainingConfig(
            seed=self.seed,
            epochs=self.epochs,
            patience=self.patience,
            requests_per_batch=self.batch_requests,
            learning_rate=default_rate if self.learning_rate is None else self.learning_rate,
            weight_decay=self.weight_decay,
            head_weights=self._head_weights(),
            time_window_h_max=self.time_window_h,
            time_window_share=self.time_window_share,
            precision=precision_of(precision),
        )

    def _head_weights(self) -> dict[str, float]:
        """Read `HEAD=WEIGHT` settings; whether there are such heads shows with the data."""
        weights: dict[str, float] = {}
        for setting in self.head_weight or []:
            head, _, weight = setting.partition("=")
            if head in weights:
                raise SettingError(f"--head-weight {setting}: {head} has a weight already; give each head one")
            try:
                weights[head] = float(weight)
            except ValueError:
                raise SettingError(f"--head-weight {setting}: write HEAD=WEIGHT, e.g. save=4") from None
        return weights


@dataclass(frozen=True, slots=True)
class ExecutionOptions(OptionGroup):
    panel = "Where it runs"

    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes cuda where there is one.")] = "auto"
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16; auto is bf16 on cuda, fp32 on cpu.")] = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; all this process may use without.")] = None


@dataclass(frozen=True, slots=True)
class CheckpointOptions(OptionGroup):
    panel = "Going on after a stop"

    checkpoints: Annotated[
        Path | None, typer.Option(help="Keep a checkpoint in this folder, renewed after every epoch.")
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Go on from this folder's checkpoint and keep it renewed; start where it has none."
        ),
    ] = None
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Renew it after so many minutes too.")] = 10.0
    checkpoint_batches: Annotated[int | None, typer.Option(min=1, help="Renew it after so many minibatches too.")] = (
        None
    )

    def plan(self) -> CheckpointPlan | None:
        from ranker.training.checkpoint import FILE, CheckpointPlan  # noqa: PLC0415

        folder = self.resume or self.checkpoints
        if folder is None:
            return None
        check_folder(folder)
        if self.resume is None and (folder / FILE).exists():
            fail(f"{folder / FILE} exists already; --resume {folder} goes on from it, or name another folder")
        return CheckpointPlan(folder, self.resume is not None, 60 * self.checkpoint_minutes, self.checkpoint_batches)


@dataclass(frozen=True, slots=True)
class TrackingOptions(OptionGroup):
    panel = "Metrics"

    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard's event files into this folder.")] = None
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Log a run to this MLflow tracking server; the model's name is the experiment."
        ),
    ] = None

    def check_places(self) -> None:
        if self.tensorboard is not None:
            check_folder(self.tensorboard)
