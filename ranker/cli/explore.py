"""`pinrank explore`. It imports its libraries only when it runs: a serving install cannot read a joined log."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kernels.engines import ENGINES
from ranker.cli.console import ConsoleReporter, explained, fail
from ranker.cli.options import OptionGroup, grouped
from ranker.cli.result_files import ResultFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from impressions.slates import Slates
    from kernels.engine import EngineFactory
    from ranker.counterfactual.evaluate import PolicyEvaluation
    from ranker.counterfactual.forecast import Settings
    from ranker.counterfactual.rewards import Reward

_ESTIMATORS = ("ips", "snips", "clipped", "dm", "dr", "sndr", "clipped-dr")


@dataclass(frozen=True, slots=True)
class PolicyChoice(OptionGroup):
    panel = "Policies"

    policy: Annotated[
        str,
        typer.Option(
            metavar="utility.toml|MODEL@V",
            help="Policy to evaluate: a utility table, a version (NAME@VERSION or NAME@LABEL, which needs --store), or "
            "logged.",
        ),
    ]
    against: Annotated[
        str,
        typer.Option(
            metavar="stable|logged",
            help="Policy to compare with: logged is the one that logged, exploration included; stable is that label of "
            "the model that logged, which needs --store; or anything that --policy takes.",
        ),
    ] = "logged"
    store: Annotated[str | None, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.")] = None
    engine: Annotated[
        str,
        typer.Option(
            help="Engine that scores logged answers with another network than the one that logged: "
            f"{', '.join(ENGINES)}."
        ),
    ] = "openvino"

    def engine_factory(self) -> EngineFactory:
        from kernels.engines import engine_factory  # noqa: PLC0415

        try:
            return engine_factory(self.engine)
        except ValueError as error:
            fail(f"--engine {self.engine}: {error}")


@dataclass(frozen=True, slots=True)
class LogChoice(OptionGroup):
    panel = "Log"

    on: Annotated[Path, typer.Option(help="Joined log, as written by pinrank impressions join --out.")]
    surface: Annotated[str, typer.Option(help="Surface to evaluate.")] = "home"
    model: Annotated[
        str | None, typer.Option(metavar="NAME@VERSION", help="Model that logged, if the log has several.")
    ] = None

    def read(self) -> Slates:
        return _slates(self.on, self.surface, self.model)


@dataclass(frozen=True, slots=True)
class EstimatorOptions(OptionGroup):
    panel = "Estimates"

    reward: Annotated[
        list[str] | None,
        typer.Option(help="Party or action to count; may be repeated. Default: each party and each head's action."),
    ] = None
    discounted: Annotated[
        bool, typer.Option("--discounted", help="Count position k by 1 / log2(k + 2) instead of 1.")
    ] = False
    estimator: Annotated[list[str] | None, typer.Option(help=f"{', '.join(_ESTIMATORS)}; may be repeated.")] = None
    unit: Annotated[
        str,
        typer.Option(
            help="orders: weigh whole orders, which supposes nothing; positions: weigh each pin at its position, which "
            "supposes that pins do not influence each other and needs less traffic."
        ),
    ] = "orders"
    ess_min: Annotated[
        float, typer.Option(min=2, help="Least effective number of users; with fewer, the command prints no number.")
    ] = 100
    clip: Annotated[float, typer.Option(min=1, help="Largest weight of the clipped estimators.")] = 10
    resamples: Annotated[int, typer.Option(min=100, help="Resamples of users for the intervals.")] = 1_000
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples and of the reward model's folds.")] = 7

    def check(self) -> None:
        unknown = [name for name in self.estimator or () if name not in _ESTIMATORS]
        if unknown:
            fail(f"--estimator {unknown[0]}: choose one of {', '.join(_ESTIMATORS)}")
        for name, limit in (("--ess-min", self.ess_min), ("--clip", self.clip)):
            if not math.isfinite(limit):
                fail(f"{name} {limit}: choose a finite number")
        if self.unit not in ("orders", "positions"):
            fail(f"--unit {self.unit}: choose orders or positions")

    def settings(self) -> Settings:
        from ranker.counterfactual.forecast import Settings  # noqa: PLC0415

        return Settings(ess_min=self.ess_min, clip=self.clip, resamples=self.resamples, seed=self.seed)

    def chosen(self, rewards: Mapping[str, Reward]) -> dict[str, Reward]:
        unknown = [name for name in self.reward or () if name not in rewards]
        if unknown:
            fail(f"--reward {unknown[0]}: choose one of {', '.join(rewards)}")
        return {name: reward for name, reward in rewards.items() if not self.reward or name in self.reward}


@grouped
def evaluate(choice: PolicyChoice, log: LogChoice, options: EstimatorOptions, results: ResultFiles) -> None:
    """Estimate from logged answers what another policy would have earned, before it is served.

    The command prints estimates with 95% intervals, or says why the log does not say enough and what to do; then it
    ends with status 1.

    Example: [bold]pinrank explore evaluate --on joined --policy utility.toml --against stable --store models[/]

    Example: [bold]pinrank explore evaluate --on joined --policy ml1m@12 --store models --reward save --report r.html[/]
    """
    options.check()
    with explained():
        from model_store.registry.store import open_model_store  # noqa: PLC0415
        from ranker.counterfactual.chosen_policy import StoredAnswers, read_comparison  # noqa: PLC0415
        from ranker.counterfactual.evaluate import evaluate_policy  # noqa: PLC0415
        from ranker.counterfactual.policies import whole_answers  # noqa: PLC0415
        from ranker.counterfactual.rewards import rewards_of  # noqa: PLC0415

        results.check(_report_writer)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        with reporter.step("reading the log"):
            answers = log.read()
            slates = whole_answers(answers)
        store = None if choice.store is None else open_model_store(choice.store)
        with reporter.step("reading the policies") as progress:
            stored = StoredAnswers(log.on, choice.engine_factory(), progress)
            compared = read_comparison(choice.policy, choice.against, slates, store, stored)
        rewards = options.chosen(rewards_of(compared.table, compared.slates, discounted=options.discounted))
        with reporter.step("resampling users"):
            evaluation = evaluate_policy(
                compared.slates, compared.policy, compared.baseline, rewards, options.settings(), log.on.name,
                compared.rescoring, answers.requests - slates.requests,
            )  # fmt: skip
        results.write(evaluation, _report_writer)
    _show(evaluation, options)


def register(app: typer.Typer) -> None:
    """Add `explore` to the `pinrank` command."""
    explore = typer.Typer(no_args_is_help=True, help="Use what exploration logged.")
    explore.command()(evaluate)
    explore.callback()(_explore)
    app.add_typer(explore, name="explore")


def _explore() -> None:
    """Use what exploration logged."""


def _slates(folder: Path, surface: str, model: str | None) -> Slates:
    from impressions.dataset import read_slates  # noqa: PLC0415

    found = read_slates(folder, surface, model)
    if len(found) != 1:
        listed = ", ".join(f"{slates.model} ({slates.requests:,} requests)" for slates in found)
        fail(f"{folder} has answers of {len(found)} models on {surface}: {listed or 'none'}; choose one with --model")
    return found[0]


def _report_writer() -> Callable[[PolicyEvaluation, Path], None]:
    from ranker.counterfactual.report import write_report  # noqa: PLC0415

    return write_report


def _show(evaluation: PolicyEvaluation, options: EstimatorOptions) -> None:
    from ranker.counterfactual.tables import answer_lines, bound_lines, forecast_table, overlap_table  # noqa: PLC0415
    from ranker.evaluation.tables import rich_table  # noqa: PLC0415

    console = Console(markup=False, emoji=False)
    caption = " ".join(answer_lines(evaluation))
    console.print(rich_table(overlap_table(evaluation), f"What the log covers of {evaluation.policy}", caption))
    result = evaluation.unit(options.unit)
    if result.refused is not None:
        elsewhere = [unit.unit for unit in evaluation.units if unit.refused is None]
        other = f" The log does say enough by --unit {elsewhere[0]}." if elsewhere else ""
        fail(f"refused: {result.refused.reason}. What to do: {result.refused.fix}.{other}")
    estimators = tuple(options.estimator or ["dr"])
    title = f"{evaluation.policy} compared with {evaluation.baseline}"
    console.print(rich_table(forecast_table(evaluation, options.unit, estimators), title, _CAPTION))
    if "clipped" in estimators:
        for line in bound_lines(evaluation, options.unit):
            console.print(line, highlight=False, soft_wrap=True)


_CAPTION = "Per request, with 95% intervals from resampled users. Bold: the interval of the difference excludes 0."
