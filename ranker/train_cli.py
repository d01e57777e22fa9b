"""`pinrank train`. It imports what it needs when it runs: serving installs lack PyTorch."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.console import ActionsOption, ConsoleReporter, DataOption, explained, fail, read_dataset
from ranker.errors import SettingError
from ranker.variants import VARIANTS, parse_sizes

if TYPE_CHECKING:
    from model_store.bundle import Bundle
    from ranker.checkpoint import CheckpointPlan

_DATA, _NETWORK, _LEARNING, _PLACE = "Data", "Network", "Learning", "Where it runs"
_STOPS, _METRICS, _BUNDLE = "Going on after a stop", "Metrics", "The bundle"
_VARIANTS = "; ".join(f"[bold]{name}[/]: {variant.description}" for name, variant in VARIANTS.items())


def train(
    utility: Annotated[
        Path, typer.Option(help="The utility table (TOML) to put into the bundle.", rich_help_panel=_BUNDLE)
    ],
    name: Annotated[str, typer.Option(help="Name of the model.", rich_help_panel=_BUNDLE)] = "ml1m",
    version: Annotated[
        int, typer.Option(min=1, help="Version to publish as; versions never change.", rich_help_panel=_BUNDLE)
    ] = 1,
    store: Annotated[
        str | None,
        typer.Option("--store", help="The model store: a folder, or s3://bucket/prefix.", rich_help_panel=_BUNDLE),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Label to point at the new version; needs --store.", rich_help_panel=_BUNDLE)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the bundle into this new folder.", rich_help_panel=_BUNDLE)
    ] = None,
    data: DataOption = "ml-1m",
    actions: ActionsOption = None,
    requests_max: Annotated[
        int | None,
        typer.Option(
            min=1, help="Learn from about so many requests, drawn evenly; all without.", rich_help_panel=_DATA
        ),
    ] = None,
    negatives: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pins drawn per training request beside those acted on; each costs a row.",
            rich_help_panel=_DATA,
        ),
    ] = 24,
    variant: Annotated[
        str, typer.Option(help=f"How the network reads the user's last actions. {_VARIANTS}.", rich_help_panel=_NETWORK)
    ] = "early",
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another size of the network, e.g. encoder_layers=1, hidden=256,128 or dropout=0.2; may be repeated. "
            "A name that is not there lists all.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.", rich_help_panel=_LEARNING)] = 7,
    epochs: Annotated[
        int, typer.Option(min=1, help="At most so many passes over the training requests.", rich_help_panel=_LEARNING)
    ] = 3,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Epochs in a row without a better validation loss to wait out; the best weights are kept.",
            rich_help_panel=_LEARNING,
        ),
    ] = 1,
    batch_requests: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests per minibatch, each with all its candidates; all ranks together.",
            rich_help_panel=_LEARNING,
        ),
    ] = 48,
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate of the schedule.", rich_help_panel=_LEARNING)
    ] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decay of weights.", rich_help_panel=_LEARNING)] = 1e-4,
    head_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEAD=WEIGHT",
            help="How much a head counts in the loss, 1 for heads that are not named; may be repeated.",
            rich_help_panel=_LEARNING,
        ),
    ] = None,
    time_window_h: Annotated[
        float,
        typer.Option(
            min=0,
            help="Hide each request's actions younger than a time drawn from 0 to so many hours; 0 hides none.",
            rich_help_panel=_LEARNING,
        ),
    ] = 24.0,
    time_window_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that this is done to.", rich_help_panel=_LEARNING)
    ] = 1.0,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; auto takes cuda where there is one.", rich_help_panel=_PLACE)
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, fp32 or bf16; auto is bf16 on cuda, fp32 on cpu.", rich_help_panel=_PLACE)
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores to use; all this process may use without.", rich_help_panel=_PLACE)
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Keep a checkpoint in this folder, renewed after every epoch.", rich_help_panel=_STOPS),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Go on from this folder's checkpoint and keep it renewed; start where it has none.",
            rich_help_panel=_STOPS,
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(min=0, help="Renew it after so many minutes too.", rich_help_panel=_STOPS)
    ] = 10.0,
    checkpoint_batches: Annotated[
        int | None, typer.Option(min=1, help="Renew it after so many minibatches too.", rich_help_panel=_STOPS)
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Write TensorBoard's event files into this folder.", rich_help_panel=_METRICS),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Log a run to this MLflow tracking server; the model's name is the experiment.",
            rich_help_panel=_METRICS,
        ),
    ] = None,
) -> None:
    """Train a ranker on interactions and make it a bundle.

    Example: [bold]pinrank train --data ml-1m --utility utility.toml --store models --version 2 --label canary[/]

    A few minutes on two cores:
    [bold]pinrank train --utility utility.toml --out bundle --requests-max 8000 --size encoder_layers=1[/]

    Saves matter most, and a stop costs ten minutes at most:
    [bold]pinrank train --utility utility.toml --out bundle --head-weight save=4 --resume run[/]

    Two processes side by side:
    [bold]torchrun --standalone --nproc-per-node 2 --no-python pinrank train --utility utility.toml --out bundle[/]
    """
    if store is None and out is None:
        fail("nowhere to put the bundle; give --store DIR, --out DIR or both")
    if label is not None and store is None:
        fail("--label needs --store DIR")
    if out is not None and out.exists():
        fail(f"{out} exists already; name a new folder")
    if resume is not None and checkpoints is not None:
        fail("--resume DIR keeps checkpoints in DIR itself; leave --checkpoints away")
    with explained():
        from model_store.store import open_model_store  # noqa: PLC0415
        from ranker.examples import Sampling  # noqa: PLC0415
        from ranker.ranks import joined  # noqa: PLC0415
        from ranker.recipe import Recipe, assist, make_bundle  # noqa: PLC0415
        from ranker.tracking import tracked  # noqa: PLC0415
        from ranker.training_contract import Execution, TrainingConfig, precision_of  # noqa: PLC0415

        recipe = Recipe(
            name=name,
            version=version,
            dataset=name,
            command=shlex.join(["pinrank", *sys.argv[1:]]),
            utility_toml=utility.read_bytes(),
            variant=variant,
            sizes=parse_sizes(size or []),
            sampling=Sampling(negatives, requests_max=requests_max),
            training=TrainingConfig(
                seed=seed,
                epochs=epochs,
                patience=patience,
                requests_per_batch=batch_requests,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                head_weights=_weights(head_weight or []),
                time_window_h_max=time_window_h,
                time_window_share=time_window_share,
                precision=precision_of(precision),
            ),
        )
        if store is not None and version in (published := open_model_store(store).versions(name)):
            fail(
                f"{name}@{version} is published already; versions never change: --version {max(published) + 1} is free"
            )
        plan = _plan(checkpoints, resume, checkpoint_minutes, checkpoint_batches)
        with joined(device) as ranks:
            reporter = ConsoleReporter(Console(stderr=True, quiet=not ranks.leads))
            if not ranks.leads:
                with ranks.leader_first():
                    dataset = read_dataset(data, actions, reporter)
                assist(dataset, recipe, reporter, Execution(ranks, plan, threads=threads))
                return
            with tracked(tensorboard, mlflow, name, recipe.described(), reporter.note) as trackers:
                with ranks.leader_first():
                    dataset = read_dataset(data, actions, reporter)
                execution = Execution(ranks, plan, trackers, threads)
                with tempfile.TemporaryDirectory() as temporary:
                    folder = out or Path(temporary) / "bundle"
                    bundle = make_bundle(folder, dataset, recipe, reporter, execution)
                    if store is not None:
                        _publish(folder, store, bundle, label)
    size_bytes = sum(len(content) for content in bundle.files.values())
    labelled = "" if label is None else f", labelled {label}"
    Console().print(f"{bundle.manifest.ref}: {size_bytes / 1e6:.2f} MB, digest {bundle.digest[:12]}{labelled}")


def _publish(folder: Path, store: str, bundle: Bundle, label: str | None) -> None:
    from model_store.store import open_model_store  # noqa: PLC0415

    models = open_model_store(store)
    models.publish(folder)
    if label is not None:
        models.set_label(bundle.manifest.name, label, bundle.manifest.version)


def _plan(checkpoints: Path | None, resume: Path | None, minutes: float, batches: int | None) -> CheckpointPlan | None:
    from ranker.checkpoint import CheckpointPlan  # noqa: PLC0415

    folder = resume or checkpoints
    return None if folder is None else CheckpointPlan(folder, resume is not None, 60 * minutes, batches)


def _weights(settings: list[str]) -> dict[str, float]:
    """Read `HEAD=WEIGHT` settings; whether there are such heads shows with the data."""
    weights = {}
    for setting in settings:
        head, _, weight = setting.partition("=")
        try:
            weights[head] = float(weight)
        except ValueError:
            raise SettingError(f"--head-weight {setting}: write HEAD=WEIGHT, e.g. save=4") from None
    return weights
