"""`pinrank evaluate`, and where this folder's commands are added to the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.console import ActionsOption, ConsoleReporter, DataOption, explained, fail, read_dataset
from ranker.train_cli import train

if TYPE_CHECKING:
    from model_store.bundle import Bundle
    from model_store.store import FolderStore


def register(app: typer.Typer) -> None:
    """Add this folder's commands to the `pinrank` command."""
    app.command()(train)
    app.command()(evaluate)


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
    with explained():
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
        reporter = ConsoleReporter(Console(stderr=True))
        log = action_log(read_dataset(data, actions, reporter))
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
