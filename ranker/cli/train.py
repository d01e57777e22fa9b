"""`pinrank train`. It imports what it needs when it runs: serving installs lack PyTorch."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.cli.console import ActionsOption, ConsoleReporter, DataOption, explained, fail, note_problems, read_dataset
from ranker.errors import SettingError
from ranker.network.variants import VARIANTS, parse_sizes

if TYPE_CHECKING:
    from model_store.bundle.files import Bundle
    from model_store.registry.store import ModelStore
    from ranker.training.checkpoint import CheckpointPlan
    from ranker.training.parent import Parent

_DATA, _NETWORK, _LEARNING, _PLACE = "Data", "Network", "Learning", "Where it runs"
_STOPS, _METRICS, _BUNDLE = "Going on after a stop", "Metrics", "The bundle"
_PARENT = "From a parent"
#: What is trained already is only to be moved a little.
_RATE, _RATE_ON = 2e-3, 5e-4
_VARIANTS = "; ".join(f"[bold]{name}[/]: {variant.description}" for name, variant in VARIANTS.items())


def train(
    utility: Annotated[
        Path | None,
        typer.Option(
            help="The utility table (TOML) to put into the bundle; the parent's without.", rich_help_panel=_BUNDLE
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model.", rich_help_panel=_BUNDLE)] = "ml1m",
    version: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Version to publish as; versions never change. The next free one without.",
            rich_help_panel=_BUNDLE,
        ),
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL|VERSION",
            help="Train on from this version of the store, on the events that it has not learned from; it is compared "
            "on the newest of them, and nothing is made that is worse.",
            rich_help_panel=_PARENT,
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Publish into --store (as without --out).", rich_help_panel=_BUNDLE)
    ] = False,
    gate_auc: Annotated[
        float, typer.Option(min=0, help="AUC that a head may lose against the parent.", rich_help_panel=_PARENT)
    ] = 0.005,
    gate_hit_percent: Annotated[
        float,
        typer.Option(
            min=0, help="Percent of HIT@3 that a head may lose, beyond the interval.", rich_help_panel=_PARENT
        ),
    ] = 2.0,
    gate_ece: Annotated[
        float, typer.Option(min=0, help="Largest calibration error of a head.", rich_help_panel=_PARENT)
    ] = 0.02,
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
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.", rich_help_panel=_LEARNING)
    ] = 7,
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
        float | None,
        typer.Option(
            help=f"Highest learning rate of the schedule (default: {_RATE:g}; from a parent {_RATE_ON:g}).",
            rich_help_panel=_LEARNING,
        ),
    ] = None,
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

    Every day, from what serves, on what is new; published only if it is no worse:
    [bold]pinrank train --data my-data --name mine --store models --parent stable --publish --label canary[/]

    Two processes side by side:
    [bold]torchrun --standalone --nproc-per-node 2 --no-python pinrank train --utility utility.toml --out bundle[/]
    """
    if store is None and out is None:
        fail("nowhere to put the bundle; give --store DIR, --out DIR or both")
    if (publish or parent is not None) and store is None:
        fail("--publish and --parent need --store")
    if utility is None and parent is None:
        fail("--utility names the table that weighs the heads; only a --parent brings one")
    if label is not None and store is None:
        fail("--label needs --store DIR")
    if resume is not None and checkpoints is not None:
        fail("--resume DIR keeps checkpoints in DIR itself; leave --checkpoints away")
    with explained():
        from model_store.bundle.files import UTILITY  # noqa: PLC0415
        from model_store.registry.store import open_model_store  # noqa: PLC0415
        from ranker.evaluation.gates import Gates  # noqa: PLC0415
        from ranker.export.publishing import free_version, publish_bundle  # noqa: PLC0415
        from ranker.recipe import assist, make_bundle  # noqa: PLC0415
        from ranker.recipe_settings import Recipe  # noqa: PLC0415
        from ranker.training.examples import Sampling  # noqa: PLC0415
        from ranker.training.ranks import joined  # noqa: PLC0415
        from ranker.training.settings import Execution, TrainingConfig, precision_of  # noqa: PLC0415
        from ranker.training.tracking import tracked  # noqa: PLC0415

        models = open_model_store(store) if store is not None else None
        origin = _parent(models, name, parent) if models is not None and parent is not None else None
        table = utility.read_bytes() if utility is not None else origin.bundle.files[UTILITY] if origin else b""
        recipe = Recipe(
            name=name,
            version=free_version(models, name, version),
            dataset=name,
            command=shlex.join(["pinrank", *sys.argv[1:]]),
            utility_toml=table,
            variant=variant,
            sizes=parse_sizes(size or []),
            sampling=Sampling(negatives, requests_max=requests_max),
            training=TrainingConfig(
                seed=seed,
                epochs=epochs,
                patience=patience,
                requests_per_batch=batch_requests,
                learning_rate=learning_rate if learning_rate is not None else _RATE_ON if origin else _RATE,
                weight_decay=weight_decay,
                head_weights=_weights(head_weight or []),
                time_window_h_max=time_window_h,
                time_window_share=time_window_share,
                precision=precision_of(precision),
            ),
        )
        gates = Gates(gate_auc, gate_hit_percent, gate_ece)
        plan = _plan(checkpoints, resume, checkpoint_minutes, checkpoint_batches)
        _check_places(out, tensorboard, models, name, label)
        with joined(device) as ranks:
            reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True, quiet=not ranks.leads))
            if not ranks.leads:
                with ranks.leader_first():
                    dataset = read_dataset(data, actions, reporter)
                assist(dataset, recipe, reporter, Execution(ranks, plan, threads=threads), origin)
                return
            with tracked(tensorboard, mlflow, name, recipe.described(), reporter.note) as trackers:
                with ranks.leader_first():
                    dataset = read_dataset(data, actions, reporter)
                note_problems(dataset, reporter)
                execution = Execution(ranks, plan, trackers, threads)
                with tempfile.TemporaryDirectory() as temporary:
                    folder = out or Path(temporary) / "bundle"
                    bundle = make_bundle(folder, dataset, recipe, reporter, execution, origin, gates)
                    if models is not None:
                        publish_bundle(folder, models, label, keep_in=Path() if out is None else None)
    _say_what_was_made(bundle, models, label)


def _say_what_was_made(bundle: Bundle, models: ModelStore | None, label: str | None) -> None:
    from ranker.export.publishing import what_is_left_to_do  # noqa: PLC0415

    size_bytes = sum(len(content) for content in bundle.files.values())
    labelled = "" if label is None else f", labelled {label}"
    console = Console(markup=False, emoji=False)
    console.print(f"{bundle.manifest.ref}: {size_bytes / 1e6:.2f} MB, digest {bundle.digest[:12]}{labelled}")
    if models is not None:
        for line in what_is_left_to_do(models, bundle, label):
            console.print(line, highlight=False, soft_wrap=True)


def _check_places(
    out: Path | None, tensorboard: Path | None, models: ModelStore | None, name: str, label: str | None
) -> None:
    """Refuse before the work what could not be written, published or labelled after it."""
    from model_store.registry.history import check_label  # noqa: PLC0415
    from ranker.cli.places import check_folder, check_new_folder  # noqa: PLC0415

    if out is not None:
        check_new_folder(out)
    if tensorboard is not None:
        check_folder(tensorboard)
    if label is not None:
        check_label(label)
    if models is not None:
        models.check_writable(name)


def _parent(models: ModelStore, name: str, parent: str) -> Parent:
    from ranker.training.parent import Parent  # noqa: PLC0415

    return Parent.of(models.read(name, int(parent) if parent.isdigit() else models.resolve(name, parent)))


def _plan(checkpoints: Path | None, resume: Path | None, minutes: float, batches: int | None) -> CheckpointPlan | None:
    from ranker.cli.places import check_folder  # noqa: PLC0415
    from ranker.training.checkpoint import FILE, CheckpointPlan  # noqa: PLC0415

    folder = resume or checkpoints
    if folder is None:
        return None
    check_folder(folder)
    if resume is None and (folder / FILE).exists():
        fail(f"{folder / FILE} exists already; --resume {folder} goes on from it, or name another folder")
    return CheckpointPlan(folder, resume is not None, 60 * minutes, batches)


def _weights(settings: list[str]) -> dict[str, float]:
    """Read `HEAD=WEIGHT` settings; whether there are such heads shows with the data."""
    weights: dict[str, float] = {}
    for setting in settings:
        head, _, weight = setting.partition("=")
        if head in weights:
            raise SettingError(f"--head-weight {setting}: {head} has a weight already; give each head one")
        try:
            weights[head] = float(weight)
        except ValueError:
            raise SettingError(f"--head-weight {setting}: write HEAD=WEIGHT, e.g. save=4") from None
    return weights
