"""The options of `pinrank train`, one class per panel of its help, and their conversion to settings.

A serving install has no PyTorch, so everything that needs it is imported on use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranker.cli.console import fail
from ranker.cli.options import OptionGroup
from ranker.cli.places import check_folder, check_new_folder
from ranker.errors import SettingError

if TYPE_CHECKING:
    from model_store.registry.store import ModelStore
    from ranker.evaluation.gates import Gates
    from ranker.training.checkpoint import CheckpointPlan
    from ranker.training.parent import Parent
    from ranker.training.settings import TrainingConfig

#: A model that continues from its parent needs smaller steps than a new one.
_RATE, _RATE_FROM_PARENT = 2e-3, 5e-4


@dataclass(frozen=True, slots=True)
class BundleOptions(OptionGroup):
    panel = "Bundle"

    utility: Annotated[
        Path | None, typer.Option(help="Utility table (TOML) for the bundle. Default: the parent's table.")
    ] = None
    explore: Annotated[
        Path | None,
        typer.Option(
            help="Exploration table (TOML) for the bundle; an empty file for none. Default: the parent's table, if any."
        ),
    ] = None
    name: Annotated[str, typer.Option(help="Model name.")] = "ml1m"
    version: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Version number of the bundle; a published version never changes. Default: the next free number.",
        ),
    ] = None
    publish: Annotated[bool, typer.Option("--publish", help="Publish to --store, as --store alone already does.")] = (
        False
    )
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Publish even if the model is not at least as good as the dot product of user and pin and as LightGBM "
            "on the newest requests. The lineage says so.",
        ),
    ] = False
    baseline_requests_max: Annotated[
        int,
        typer.Option(
            min=1,
            help="Approximate maximum number of training requests that LightGBM learns from, sampled evenly. More take "
            "longer, and hold a model of many requests to more.",
        ),
    ] = 5_000
    store: Annotated[str | None, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.")] = None
    label: Annotated[str | None, typer.Option(help="Label to move to the new version; requires --store.")] = None
    out: Annotated[Path | None, typer.Option(help="New folder to write the bundle to.")] = None

    def open_store(self) -> ModelStore | None:
        from model_store.registry.store import open_model_store  # noqa: PLC0415

        return None if self.store is None else open_model_store(self.store)

    def utility_table(self, parent: Parent | None) -> bytes:
        """Read the utility table; without one, the parent's."""
        from model_store.bundle.files import UTILITY  # noqa: PLC0415

        if self.utility is not None:
            return self.utility.read_bytes()
        return parent.bundle.files[UTILITY] if parent else b""

    def exploration_table(self, parent: Parent | None) -> bytes:
        """Read the exploration table; without one, the parent's. Empty if there is none."""
        from model_store.bundle.files import EXPLORATION  # noqa: PLC0415

        if self.explore is not None:
            return self.explore.read_bytes()
        return parent.bundle.files.get(EXPLORATION, b"") if parent else b""

    def check_places(self, models: ModelStore | None) -> None:
        """Check before the work that the bundle can be written, published and labelled after it."""
        from model_store.registry.history import check_label  # noqa: PLC0415

        if self.out is not None:
            check_new_folder(self.out)
        if self.label is not None:
            check_label(self.label)
        if models is not None:
            models.check_writable(self.name)


@dataclass(frozen=True, slots=True)
class ParentOptions(OptionGroup):
    panel = "Parent"

    parent: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL|VERSION",
            help="Continue training from this version in the store, on the events that it has not learned from. Both "
            "models are compared on the newest of these events; train writes no bundle if the new one is worse.",
        ),
    ] = None
    gate_auc: Annotated[float, typer.Option(min=0, help="Largest loss of AUC per head, compared with the parent.")] = (
        0.005
    )
    gate_hit_percent: Annotated[
        float,
        typer.Option(
            min=0, help="Largest relative loss of HIT@3 per head, in percent, beyond the confidence interval."
        ),
    ] = 2.0
    gate_ece: Annotated[float, typer.Option(min=0, help="Largest calibration error per head.")] = 0.02
    gate_decile_factor: Annotated[
        float,
        typer.Option(
            min=1,
            help="How many times more, or fewer, actions than predicted may come, per head, in each tenth of the rows "
            "by probability for which more than 50 are predicted.",
        ),
    ] = 3.0
    gate_ope: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"HEAD|PARTY >= NUMBER"',
            help="With --impressions: least difference to the parent of an action's rate, or of a party's utility, per "
            "request, by the low end of a 95% interval that is estimated from the newest logged answers with all "
            "candidates of their requests; may be repeated.",
        ),
    ] = None

    def read(self, models: ModelStore | None, name: str) -> Parent | None:
        from ranker.training.parent import Parent  # noqa: PLC0415

        if models is None or self.parent is None:
            return None
        version = int(self.parent) if self.parent.isdigit() else models.resolve(name, self.parent)
        return Parent.of(models.read(name, version))

    def gates(self) -> Gates:
        from ranker.evaluation.gates import Gates, parse_rate_gate  # noqa: PLC0415

        rates = tuple(parse_rate_gate(text) for text in self.gate_ope or [])
        return Gates(self.gate_auc, self.gate_hit_percent, self.gate_ece, self.gate_decile_factor, rates)


@dataclass(frozen=True, slots=True)
class TrainingOptions(OptionGroup):
    panel = "Training"

    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed.")] = 7
    epochs: Annotated[int, typer.Option(min=1, help="Maximum number of passes over the training requests.")] = 3
    newest_epochs: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum number of passes over every other validation request, the newest to learn from, after those "
            "over the training requests; the other half calibrates. 0 leaves them out, and all calibrate.",
        ),
    ] = 3
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Successive epochs to tolerate that are not better on the validation requests: by the heads' losses "
            "and by the utility's order. The best weights are kept.",
        ),
    ] = 1
    batch_requests: Annotated[
        int,
        typer.Option(
            min=1, help="Requests per minibatch, over all ranks. A request always keeps all of its candidates."
        ),
    ] = 24
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Peak learning rate (default: {_RATE:g}, or {_RATE_FROM_PARENT:g} with --parent)."),
    ] = None
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 1e-4
    head_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEAD=WEIGHT",
            help="Weight of a head in the loss; may be repeated. Default: 1 for each head.",
        ),
    ] = None
    time_window_h: Annotated[
        float,
        typer.Option(
            min=0,
            help="Hide each request's actions below an age sampled between 0 and this many hours; 0 hides none.",
        ),
    ] = 0.0
    time_window_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the requests to which --time-window-h applies.")
    ] = 1.0
    off_policy: Annotated[
        bool,
        typer.Option(
            "--off-policy",
            help="With --impressions of a policy that explores: weigh each shown pin by its clipped inverse "
            "propensity, and each action by the inverse of the chance that users look at its position.",
        ),
    ] = False
    off_policy_clip: Annotated[float, typer.Option(min=1, help="Largest of these weights.")] = 10.0

    def config(self, precision: str, *, from_parent: bool) -> TrainingConfig:
        from ranker.training.settings import TrainingConfig, precision_of  # noqa: PLC0415

        default_rate = _RATE_FROM_PARENT if from_parent else _RATE
        return TrainingConfig(
            seed=self.seed,
            epochs=self.epochs,
            newest_epochs=self.newest_epochs,
            patience=self.patience,
            requests_per_batch=self.batch_requests,
            learning_rate=default_rate if self.learning_rate is None else self.learning_rate,
            weight_decay=self.weight_decay,
            head_weights=self._head_weights(),
            time_window_h_max=self.time_window_h,
            time_window_share=self.time_window_share,
            off_policy_clip=self.off_policy_clip if self.off_policy else None,
            precision=precision_of(precision),
        )

    def _head_weights(self) -> dict[str, float]:
        """Parse `HEAD=WEIGHT` settings. Whether the heads exist is checked with the data."""
        weights: dict[str, float] = {}
        for setting in self.head_weight or []:
            head, _, weight = setting.partition("=")
            if head in weights:
                raise SettingError(f"--head-weight {setting}: {head} already has a weight; set each head once")
            try:
                weights[head] = float(weight)
            except ValueError:
                raise SettingError(f"--head-weight {setting}: write HEAD=WEIGHT, e.g. save=4") from None
        return weights


@dataclass(frozen=True, slots=True)
class ExecutionOptions(OptionGroup):
    panel = "Execution"

    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto uses cuda if it is available.")] = "auto"
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16; auto uses bf16 on cuda and fp32 on cpu.")] = "auto"
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of cores to use. Default: all that are available to this process.")
    ] = None


@dataclass(frozen=True, slots=True)
class CheckpointOptions(OptionGroup):
    panel = "Checkpoints"

    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; train writes one after every epoch.")
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Resume from the checkpoint in this folder and keep updating it. Starts anew if there is none.",
        ),
    ] = None
    checkpoint_minutes: Annotated[
        float, typer.Option(min=0, help="Also write a checkpoint after this many minutes.")
    ] = 10.0
    checkpoint_batches: Annotated[
        int | None, typer.Option(min=1, help="Also write a checkpoint after this many minibatches.")
    ] = None

    def plan(self) -> CheckpointPlan | None:
        from ranker.training.checkpoint import FILE, CheckpointPlan  # noqa: PLC0415

        folder = self.resume or self.checkpoints
        if folder is None:
            return None
        check_folder(folder)
        if self.resume is None and (folder / FILE).exists():
            fail(f"{folder / FILE} already exists; use --resume {folder} to continue from it, or choose another folder")
        return CheckpointPlan(folder, self.resume is not None, 60 * self.checkpoint_minutes, self.checkpoint_batches)


@dataclass(frozen=True, slots=True)
class TrackingOptions(OptionGroup):
    panel = "Tracking"

    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard event files.")] = None
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow tracking server to log to; the experiment is named after the model."),
    ] = None

    def check_places(self) -> None:
        if self.tensorboard is not None:
            check_folder(self.tensorboard)
