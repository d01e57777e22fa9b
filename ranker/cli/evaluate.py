"""`pinrank evaluate`. It imports its libraries only when it runs: a serving install cannot read datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kernels.engines import ENGINES
from ranker.cli.console import (
    ActionsOption,
    ConsoleReporter,
    DataOption,
    explained,
    fail,
    note_problems,
    read_dataset,
    read_given_vectors,
)
from ranker.cli.options import OptionGroup, grouped
from ranker.cli.result_files import ResultFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kernels.engine import EngineFactory
    from model_store.bundle.files import Bundle
    from model_store.registry.store import ModelStore
    from ranker.baselines.score import BaselinePlan
    from ranker.embedding.vector_file import GivenVectors
    from ranker.evaluation.results import Evaluation


@dataclass(frozen=True, slots=True)
class BundleChoice(OptionGroup):
    store: Annotated[str | None, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.")] = None
    model: Annotated[str, typer.Option(help="Model name in the store.")] = "ml1m"
    versions: Annotated[list[int] | None, typer.Option("--version", help="Version to evaluate; may be repeated.")] = (
        None
    )
    labels: Annotated[list[str] | None, typer.Option("--label", help="Label to evaluate; may be repeated.")] = None
    folders: Annotated[
        list[Path] | None,
        typer.Option("--bundle", help="Bundle folder of any model, shown by its folder name; may be repeated."),
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Baseline of the comparison: a version, a label, the name of a bundle folder, or popularity. "
            "Default: the first of several bundles; popularity for a single bundle."
        ),
    ] = None

    def read(self) -> dict[str, Bundle]:
        return _chosen(self.store, self.model, self.versions or [], self.labels or [], self.folders or [])

    def named_baseline(self, bundles: Mapping[str, Bundle]) -> str | None:
        return None if self.baseline is None else _named(self.baseline, bundles, self.store, self.model)


@dataclass(frozen=True, slots=True)
class ScoringOptions(OptionGroup):
    data: DataOption = "ml-1m"
    actions: ActionsOption = None
    requests_max: Annotated[int, typer.Option(min=1, help="Approximate maximum number of test requests.")] = 3_000
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling candidates and for resampling users.")] = 7
    baselines: Annotated[
        bool,
        typer.Option(
            help="Also compare with the dot product, item kNN and LightGBM, which takes about a minute more, and less "
            "once its trees are cached. Without them, the comparison is with popularity only."
        ),
    ] = True
    baseline_requests_max: Annotated[
        int,
        typer.Option(
            min=1,
            help="Approximate maximum number of training requests that LightGBM learns from, sampled evenly from those "
            "of the first bundle. The note of the first table and the JSON say how many it learned from.",
        ),
    ] = 5_000
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores that LightGBM uses. Default: all that are available.")
    ] = None
    pin_vectors: Annotated[
        list[Path] | None,
        typer.Option(
            help="Vectors of pins, or network.npz, that `pinrank embed` made, for the bundles that read their space, "
            "instead of those that a bundle carries; repeat it for several spaces. A network makes vectors anew as "
            "time goes on."
        ),
    ] = None
    engine: Annotated[str, typer.Option(help=f"Scoring engine: {', '.join(ENGINES)}.")] = "openvino"

    def plan(self, bundles: Mapping[str, Bundle]) -> BaselinePlan | None:
        from ranker.baselines.score import BaselinePlan  # noqa: PLC0415

        if not self.baselines:
            return None
        lineage = next(iter(bundles.values())).manifest.lineage
        return BaselinePlan.of_training(lineage, self.threads, self.baseline_requests_max)

    def vectors(self) -> list[GivenVectors]:
        return [read_given_vectors(path) for path in self.pin_vectors or []]

    def engine_factory(self) -> EngineFactory:
        from kernels.engines import engine_factory  # noqa: PLC0415

        try:
            return engine_factory(self.engine)
        except ValueError as error:
            fail(str(error))


@grouped
def evaluate(choice: BundleChoice, scoring: ScoringOptions, output: ResultFiles) -> None:
    """Compare bundles with each other and with baselines on the newest tenth of the data.

    The command scores as the server does, with the engine, feature assembly, calibration and utility of each bundle.
    Without --version, --label or --bundle, it compares every labelled version.

    Example: [bold]pinrank evaluate --store models --model ml1m --version 1 --version 2 --report report.html[/]

    Example: [bold]pinrank evaluate --data my-data --bundle runs/late --bundle runs/early --baseline late[/]
    """
    with explained():
        from ranker.data.actions import action_log  # noqa: PLC0415
        from ranker.embedding.users.carried import encoders_in  # noqa: PLC0415
        from ranker.evaluation.evaluate import evaluate as evaluate_bundles  # noqa: PLC0415
        from ranker.training.examples import Sampling  # noqa: PLC0415

        output.check(_report_writer)
        factory = scoring.engine_factory()
        bundles, vectors = choice.read(), scoring.vectors()
        baseline = choice.named_baseline(bundles)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        dataset = read_dataset(scoring.data, scoring.actions, reporter)
        note_problems(dataset, reporter)
        with reporter.step("scoring") as progress:
            evaluation = evaluate_bundles(
                bundles,
                action_log(dataset),
                factory,
                Sampling(requests_max=scoring.requests_max),
                scoring.seed,
                progress=lambda what, done, total: progress(done, total, what),
                baseline=baseline,
                data=dataset.name,
                against=scoring.plan(bundles),
                vectors=vectors,
                encoders=encoders_in(bundles.values()),
            )
        output.write(evaluation, _report_writer)
        _show(evaluation)


def _report_writer() -> Callable[[Evaluation, Path], None]:
    from ranker.evaluation.report import write_report  # noqa: PLC0415

    return write_report


def _show(evaluation: Evaluation) -> None:
    from ranker.evaluation.tables import baseline_lines, terminal_tables  # noqa: PLC0415

    console = Console(markup=False, emoji=False)
    for table in terminal_tables(evaluation):
        console.print(table)
    for line in baseline_lines(evaluation):
        console.print(line, highlight=False, soft_wrap=True)
    for scorer in evaluation.scorers:
        if scorer.utility_missing is not None:
            reason = f"{scorer.name} has no HIT@3 by utility: {scorer.utility_missing}"
            console.print(reason, highlight=False)
        if scorer.heads_missing:
            missing = f"{scorer.name} does not predict {', '.join(scorer.heads_missing)}"
            console.print(missing, highlight=False)


def _chosen(
    store: str | None, model: str, versions: list[int], labels: list[str], folders: list[Path]
) -> dict[str, Bundle]:
    """Read the chosen bundles by display name: versions from oldest to newest, then folders in the order given."""
    from model_store.bundle.files import read_bundle  # noqa: PLC0415
    from model_store.registry.store import open_model_store  # noqa: PLC0415

    if store is None and (versions or labels):
        fail("--version and --label require --store DIR")
    if store is None and not folders:
        fail("there is nothing to evaluate; add --store DIR, --bundle DIR or both")
    chosen: dict[str, Bundle] = {}
    if store is not None and (versions or labels or not folders):
        chosen |= _stored(open_model_store(store), model, versions, labels)
    for folder in folders:
        name = folder.resolve().name
        if name in chosen:
            fail(f"two bundles have the name {name!r}; rename one of the folders")
        chosen[name] = read_bundle(folder)
    return chosen


def _stored(store: ModelStore, model: str, versions: list[int], labels: list[str]) -> dict[str, Bundle]:
    """Read versions, oldest first, by a name that shows version and labels; all labelled versions if none is chosen."""
    known = store.labels(model)
    if not versions and not labels:
        labels = list(known)
        if not labels:
            fail(f"model {model!r} has no labels yet; choose a version with --version")
    wanted = sorted({*versions, *(store.resolve(model, label) for label in labels)})
    named = {version: [label for label, labelled in known.items() if labelled == version] for version in wanted}
    return {
        f"{model}@{version}" + (f" ({', '.join(named[version])})" if named[version] else ""): store.read(model, version)
        for version in wanted
    }


def _named(wanted: str, bundles: Mapping[str, Bundle], store: str | None, model: str) -> str:
    """Return the display name of a baseline given as version, label or folder; unknown names are rejected later."""
    from model_store.registry.store import open_model_store  # noqa: PLC0415

    if wanted in bundles or store is None:
        return wanted
    version = int(wanted) if wanted.isdigit() else open_model_store(store).labels(model).get(wanted)
    stored = (name for name in bundles if name.split(" ")[0] == f"{model}@{version}")
    return next(stored, wanted)
