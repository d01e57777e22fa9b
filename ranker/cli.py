"""`pinrank train` and `pinrank evaluate`. They import what they need when they run: serving installs lack PyTorch."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker import data_cli
from ranker.console import ActionsOption, DataOption, fail
from ranker.console import ConsoleReporter as _ConsoleReporter
from ranker.console import explained as _explained
from ranker.console import read_dataset as _read

if TYPE_CHECKING:
    from model_store.bundle import Bundle
    from model_store.store import FolderStore

StoreOption = Annotated[Path | None, typer.Option("--store", help="The model store's folder.")]


def register(app: typer.Typer) -> None:
    """Add this folder's commands to the `pinrank` command."""
    app.command()(train)
    app.command()(evaluate)
    data_cli.register(app)


def train(
    utility: Annotated[Path, typer.Option(help="The utility table (TOML) to put into the bundle.")],
    data: DataOption = "ml-1m",
    actions: ActionsOption = None,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "ml1m",
    version: Annotated[int, typer.Option(min=1, help="Version to publish as; versions never change.")] = 1,
    store: StoreOption = None,
    label: Annotated[str | None, typer.Option(help="Label to point at the new version; needs --store.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the bundle into this new folder.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 7,
    epochs: Annotated[int, typer.Option(min=1, help="At most so many passes over the training examples.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of the schedule.")] = 2e-3,
    sequence: Annotated[bool, typer.Option(help="Whether the network reads the user's last actions.")] = True,
) -> None:
    """Train a ranker on interactions and make it a bundle.

    Example: [bold]pinrank train --data ml-1m --utility utility.toml --store models --version 2 --label canary[/]

    Example: [bold]pinrank train --data my-data --name mine --utility utility.toml --out bundle --no-sequence[/]
    """
    if store is None and out is None:
        fail("nowhere to put the bundle; give --store DIR, --out DIR or both")
    if label is not None and store is None:
        fail("--label needs --store DIR")
    if out is not None and out.exists():
        fail(f"{out} exists already; name a new folder")
    with _explained():
        from model_store.store import FolderStore  # noqa: PLC0415
        from ranker.recipe import Recipe, make_bundle  # noqa: PLC0415
        from ranker.training import TrainingConfig  # noqa: PLC0415

        recipe = Recipe(
            name=name,
            version=version,
            dataset=name,
            command=shlex.join(["pinrank", *sys.argv[1:]]),
            utility_toml=utility.read_bytes(),
            sequence=sequence,
            training=TrainingConfig(seed=seed, epochs=epochs, learning_rate=learning_rate),
        )
        reporter = _ConsoleReporter(Console(stderr=True))
        dataset = _read(data, actions, reporter)
        with tempfile.TemporaryDirectory() as temporary:
            folder = out or Path(temporary) / "bundle"
            bundle = make_bundle(folder, dataset, recipe, reporter)
            if store is not None:
                models = FolderStore(store)
                models.publish(folder)
                if label is not None:
                    models.set_label(name, label, version)
    size_bytes = sum(len(content) for content in bundle.files.values())
    labelled = "" if label is None else f", labelled {label}"
    Console().print(f"{bundle.manifest.ref}: {size_bytes / 1e6:.2f} MB, digest {bundle.digest[:12]}{labelled}")


def evaluate(
    store: Annotated[Path, typer.Option("--store", help="The model store's folder.")],
    model: Annotated[str, typer.Option(help="Name of the model.")] = "ml1m",
    versions: Annotated[list[int] | None, typer.Option("--version", help="A version; may be repeated.")] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", help="A label; may be repeated.")] = None,
    data: DataOption = "ml-1m",
    actions: ActionsOption = None,
    requests_max: Annotated[int, typer.Option(min=1, help="At most about so many test requests.")] = 3_000,
    seed: Annotated[int, typer.Option(help="Of the drawn candidates.")] = 7,
    engine: Annotated[str, typer.Option(help="The runtime to score with: openvino or numpy.")] = "openvino",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Compare versions of a model, and plain popularity, on the newest tenth of the data.

    Scores go the way the server takes: the bundle's engine, its assembler, its calibration. Without --version or
    --label, every labelled version is compared.

    Example: [bold]pinrank evaluate --store models --model ml1m --json evaluation.json[/]
    """
    with _explained():
        from kernels.opening import engine_factory  # noqa: PLC0415
        from model_store.store import FolderStore  # noqa: PLC0415
        from ranker.actions import action_log  # noqa: PLC0415
        from ranker.evaluation import evaluate as evaluate_bundles  # noqa: PLC0415
        from ranker.evaluation import table_of  # noqa: PLC0415
        from ranker.examples import Sampling  # noqa: PLC0415

        try:
            factory = engine_factory(engine)
        except ValueError as error:
            fail(str(error))
        bundles = _chosen(FolderStore(store), model, versions or [], labels or [])
        reporter = _ConsoleReporter(Console(stderr=True))
        log = action_log(_read(data, actions, reporter))
        with reporter.step("scoring") as progress:
            evaluation = evaluate_bundles(
                bundles,
                log,
                factory,
                Sampling(requests_max=requests_max),
                seed,
                progress=lambda _, done, total: progress(done, total),
            )
        if json_path is not None:
            json_path.write_text(json.dumps(evaluation.as_json(), indent=2) + "\n")
    Console().print(table_of(evaluation))


def _chosen(store: FolderStore, model: str, versions: list[int], labels: list[str]) -> dict[str, Bundle]:
    """Read the versions asked for, oldest first, under names that say their version and labels."""
    known = store.labels(model)
    if not versions and not labels:
        labels = list(known)
        if not labels:
            fail(f"model {model!r} has no labels yet; say which --version to evaluate")
    wanted = sorted({*versions, *(store.resolve(model, label) for label in labels)})
    named = {version: [label for label, labelled in known.items() if labelled == version] for version in wanted}
    return {
        f"{model}@{version}" + (f" ({', '.join(named[version])})" if named[version] else ""): store.read(model, version)
        for version in wanted
    }
