"""`pinrank tune`. It imports its libraries only when it runs: a serving install cannot read datasets."""

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
    explained,
    fail,
    note_problems,
    read_dataset,
    read_version,
)
from ranker.cli.options import OptionGroup, grouped
from ranker.cli.places import check_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model_store.bundle.files import Bundle
    from model_store.bundle.manifest import Manifest
    from model_store.registry.store import ModelStore
    from ranker.tuning.constants import FreeConstant
    from ranker.tuning.inputs import TuningData
    from ranker.tuning.results import ConstantSearch, TunedWeights
    from ranker.tuning.tune import Goal


@dataclass(frozen=True, slots=True)
class RequestOptions(OptionGroup):
    panel = "Requests"

    on: Annotated[
        Path | None, typer.Option(help="Joined dataset of logged answers: what `pinrank impressions join` wrote.")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Instead: a folder of RecBole atomic files, or ml-1m; its test part is scored with the model."
        ),
    ] = None
    actions: ActionsOption = None
    surface: Annotated[str, typer.Option(help="Surface to tune.")] = "home"
    requests_max: Annotated[int, typer.Option(min=1, help="With --data: approximate maximum number of requests.")] = (
        3_000
    )
    top_k: Annotated[int, typer.Option(min=0, help="Number of positions of an answer that count; 0 means all.")] = 0
    engine: Annotated[str, typer.Option(help=f"With --data: scoring engine: {', '.join(ENGINES)}.")] = "openvino"

    def check(self) -> None:
        if (self.on is None) == (self.data is None):
            fail("say what to tune on: either --on DIR, a joined dataset, or --data DIR, a dataset of interactions")

    def read(self, bundle: Bundle, store: ModelStore, seed: int, reporter: ConsoleReporter) -> TuningData:
        from ranker.tuning.inputs import logged_requests, versions_of_network  # noqa: PLC0415

        if self.on is None:
            return self._scored(bundle, seed, reporter)
        with reporter.step("reading answers"):
            return logged_requests(self.on, bundle, self.surface, versions_of_network(store, bundle))

    def _scored(self, bundle: Bundle, seed: int, reporter: ConsoleReporter) -> TuningData:
        from kernels.engines import engine_factory  # noqa: PLC0415
        from ranker.data.actions import action_log  # noqa: PLC0415
        from ranker.embedding.users.carried import encoders_in  # noqa: PLC0415
        from ranker.training.examples import Sampling  # noqa: PLC0415
        from ranker.tuning.inputs import dataset_requests  # noqa: PLC0415

        try:
            factory = engine_factory(self.engine)
        except ValueError as error:
            fail(str(error))
        dataset = read_dataset(self.data or "", self.actions, reporter)
        note_problems(dataset, reporter)
        sampling, log = Sampling(requests_max=self.requests_max), action_log(dataset)
        with reporter.step("scoring") as progress:
            return dataset_requests(
                bundle, self.surface, log, factory, sampling, seed, dataset.name,
                lambda what, done, total: progress(done, total, what), encoders_in([bundle]),
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GoalOptions(OptionGroup):
    panel = "Goal"

    model: Annotated[str, typer.Option(help="Model to tune: NAME@VERSION or NAME@LABEL.")]
    store: Annotated[
        str, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.", envvar="PINRANK_MODEL_STORE")
    ]
    at_least: Annotated[
        list[str],
        typer.Option(
            help="What a party must get per request: PARTY=VALUE, or PARTY=+PERCENT% relative to the weights in force. "
            "Several may follow, or repeat the option."
        ),
    ]
    more: Annotated[list[str] | None, typer.Argument(metavar="[PARTY=VALUE]...", hidden=True)] = None
    maximise: Annotated[str, typer.Option(help="Party that gets the most that is possible.")] = "pinner"
    free: Annotated[
        list[str] | None,
        typer.Option(
            help='Constant to search as well, e.g. "hide in [1,5]": the factor of hide in the maximised party\'s '
            'expression; or "PARTY: 2 in [1,5]": the constant that is written as 2. May be repeated.'
        ),
    ] = None
    trials: Annotated[int, typer.Option(min=1, help="With --free: number of constants to try.")] = 100
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of users to check the constraints on instead of tuning.")
    ] = 0.3
    seed: Annotated[int, typer.Option(min=0, help="Random seed: held-out users, resamples, trials.")] = 7


@dataclass(frozen=True, slots=True)
class ResultOptions(OptionGroup):
    panel = "Result"

    out: Annotated[Path | None, typer.Option(help="Utility table (TOML) to write.")] = None
    report: Annotated[Path | None, typer.Option(help="HTML file to write a report with charts to.")] = None

    def check(self) -> None:
        """Check before the work that the results can be written after it."""
        for path in (self.out, self.report):
            if path is not None:
                check_file(path)
        if self.report is not None:
            import ranker.tuning.report  # noqa: F401, PLC0415 - matplotlib may be missing


@grouped
def tune(goal: GoalOptions, requests: RequestOptions, result: ResultOptions) -> None:
    """Find the weights of a surface that give one party the most, while the others get at least what you ask for.

    Example: [bold]pinrank tune --model ml1m@stable --store models --on joined --surface home --maximise pinner
    --at-least creator=+10% merchant=0.42 --out utility.toml --report tune.html[/]

    Then publish the same network with the new table:
    [bold]pinrank model retune ml1m 42 --utility utility.toml --label canary --store models[/]
    """
    requests.check()
    with explained():
        from model_store.bundle.files import UTILITY  # noqa: PLC0415
        from model_store.registry.store import open_model_store  # noqa: PLC0415
        from ranker.tuning.constants import find_constants  # noqa: PLC0415
        from ranker.tuning.inputs import utility_of  # noqa: PLC0415
        from ranker.tuning.results import Infeasible  # noqa: PLC0415
        from ranker.tuning.tables import answer_lines, dropped_lines, search_lines  # noqa: PLC0415
        from ranker.tuning.thetas import parse_thetas  # noqa: PLC0415
        from ranker.tuning.tune import Goal  # noqa: PLC0415
        from ranker.tuning.tune import tune as tune_weights  # noqa: PLC0415
        from ranker.tuning.utility_file import tuned_table  # noqa: PLC0415

        result.check()
        thetas = parse_thetas([*goal.at_least, *(goal.more or [])])
        store = open_model_store(goal.store)
        bundle = read_version(store, goal.model)
        table = utility_of(bundle, requests.surface)
        surface = table.surfaces[requests.surface]
        wanted = Goal(goal.maximise, thetas, surface.weights).checked(surface.parties)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        constants = find_constants(goal.free or [], surface, wanted)
        data = requests.read(bundle, store, goal.seed, reporter)
        search = _searched(constants, wanted, goal, data, bundle, requests.top_k, reporter)
        content = bundle.files[UTILITY] if search is None else search.content
        ordering = data.scored(utility_of(bundle, data.surface, content), requests.top_k)
        with reporter.step("tuning") as progress:
            tuned = tune_weights(
                data.scored(table, requests.top_k), wanted, goal.seed, goal.hold_out, progress=progress,
                ordering=ordering,
            )  # fmt: skip
        if isinstance(tuned, Infeasible):
            fail(str(tuned))
        statement_notes = [*answer_lines(data.answers), *(() if search is None else search_lines(search))]
        notes = [*dropped_lines(surface.at_least, wanted), *statement_notes]
        _show(tuned, wanted, data, notes)
        written = tuned_table(content, bundle, data, wanted, tuned, statement_notes)
        _write(result, written, bundle.manifest, data, tuned, notes)


def _searched(
    constants: Sequence[FreeConstant], wanted: Goal, goal: GoalOptions, data: TuningData, bundle: Bundle, top_k: int,
    reporter: ConsoleReporter,
) -> ConstantSearch | None:  # fmt: skip
    from ranker.tuning.constants import search_constants  # noqa: PLC0415
    from ranker.tuning.results import Infeasible  # noqa: PLC0415

    if not constants:
        return None
    with reporter.step("constants") as progress:
        search = search_constants(
            data, bundle, wanted, constants, goal.seed, goal.trials, goal.hold_out, top_k, progress
        )
    if isinstance(search, Infeasible):
        fail(str(search))
    return search


def _show(tuned: TunedWeights, goal: Goal, data: TuningData, notes: Sequence[str]) -> None:
    from ranker.tuning.tables import alert_lines, summary, terminal_table  # noqa: PLC0415

    console = Console(markup=False, emoji=False)
    console.print(terminal_table(tuned, goal.maximised))
    for line in (*summary(tuned), *notes, *alert_lines(tuned, data.surface)):
        console.print(line, highlight=False, soft_wrap=True)


def _write(
    result: ResultOptions,
    written: bytes,
    manifest: Manifest,
    data: TuningData,
    tuned: TunedWeights,
    notes: Sequence[str],
) -> None:
    if result.report is not None:
        from ranker.tuning.report import write_report  # noqa: PLC0415

        write_report(result.report, data, manifest.ref, tuned, notes)
    if result.out is not None:
        result.out.write_bytes(written)
        publish = f"pinrank model retune {manifest.name} {manifest.version} --utility {result.out}"
        typer.echo(f"wrote {result.out}; publish it: {publish}")
