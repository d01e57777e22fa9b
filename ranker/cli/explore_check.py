"""`pinrank explore check`. It imports its libraries only when it runs: a serving install cannot read a joined log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ranker.cli.console import explained, fail, read_version
from ranker.cli.options import OptionGroup, grouped

if TYPE_CHECKING:
    from model_store.bundle.files import Bundle
    from model_store.exploration.explorer import Explorer
    from model_store.registry.store import ModelStore
    from ranker.exploration.preview import ExplorationPreview
    from ranker.tuning.inputs import AnswerCounts


@dataclass(frozen=True, slots=True)
class TableChoice(OptionGroup):
    panel = "Table"

    table: Annotated[Path, typer.Argument(metavar="explore.toml", exists=True, dir_okay=False, help="Table to check.")]
    model: Annotated[str, typer.Option(help="Version that it is for: NAME@VERSION or NAME@LABEL.")]
    store: Annotated[
        str, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.", envvar="PINRANK_MODEL_STORE")
    ]


@dataclass(frozen=True, slots=True)
class AnswerChoice(OptionGroup):
    panel = "Log"

    on: Annotated[
        Path | None,
        typer.Option(help="Joined log of the same network: also say what each arm would do to its requests."),
    ] = None
    top_k: Annotated[int, typer.Option(min=0, help="Number of pins that an answer returns; 0 means all.")] = 0


@grouped
def check(choice: TableChoice, answers: AnswerChoice) -> None:
    """Check an exploration table for a version, and see what it would do before it is served.

    Example: [bold]pinrank explore check explore.toml --model ml1m@stable --store models --on joined[/]
    """
    with explained():
        from model_store.bundle.files import UTILITY  # noqa: PLC0415
        from model_store.exploration.table import load_exploration  # noqa: PLC0415
        from model_store.model.utility import load_utility  # noqa: PLC0415
        from model_store.registry.store import open_model_store  # noqa: PLC0415

        store = open_model_store(choice.store)
        bundle = read_version(store, choice.model)
        utility = load_utility(bundle.files[UTILITY], bundle.manifest)
        exploration = load_exploration(choice.table.read_bytes(), bundle.manifest, utility)
        typer.echo(f"{choice.table} fits {bundle.manifest.ref}")
        for surface, explorer in exploration.surfaces.items():
            typer.echo(f"{surface}: {_described(explorer)}")
        if answers.on is not None:
            _preview(exploration.surfaces, bundle, store, answers.on, answers.top_k)


def _described(explorer: Explorer) -> str:
    from model_store.exploration.orders import OrderExplorer  # noqa: PLC0415
    from model_store.exploration.weights import WeightsExplorer  # noqa: PLC0415

    if isinstance(explorer, WeightsExplorer):
        how = f"by the weights of {', '.join(explorer.arms)}"
    elif isinstance(explorer, OrderExplorer):
        how = f"by drawn orders of up to {explorer.best} candidates"
    else:
        raise TypeError(f"an explorer of another kind: {type(explorer).__name__}")
    return (
        f"{100 * explorer.share:.4g}% of the requests explore, {how}, and give up at most "
        f"{100 * explorer.regret_max:.4g}% of their predicted utility"
    )


def _preview(surfaces: Mapping[str, Explorer], bundle: Bundle, store: ModelStore, folder: Path, top_k: int) -> None:
    from ranker.errors import DatasetError  # noqa: PLC0415
    from ranker.exploration.preview import preview  # noqa: PLC0415
    from ranker.tuning.inputs import logged_requests, utility_of, versions_of_network  # noqa: PLC0415

    console, lacking = Console(markup=False, emoji=False), []
    for surface, explorer in surfaces.items():
        utility = utility_of(bundle, surface)
        try:
            data = logged_requests(folder, bundle, surface, versions_of_network(store, bundle))
        except DatasetError as error:  # the other surfaces may have requests
            lacking.append(f"{surface}: {error}")
            continue
        found = preview(data.scored(utility, top_k), utility.surfaces[surface].weights, explorer)
        console.print(_table(surface, found))
        for line in _answer_lines(data.answers):
            console.print(line, highlight=False, soft_wrap=True)
    if lacking:
        fail("; ".join(lacking))


def _answer_lines(answers: AnswerCounts | None) -> Iterator[str]:
    if answers is not None and answers.cut:
        cut = f"{answers.cut:,} of {answers.whole + answers.cut:,} answers do not hold all candidates of their requests"
        if answers.whole_only:
            yield f"{cut} and were left out"
        else:
            yield f"warning: {cut}; in these, an arm could only reorder the pins that were shown"


_HEADINGS = ("arm", "of all requests", "differs", "withheld", "regret", "effective users")


def _table(surface: str, found: ExplorationPreview) -> Table:
    effective = (
        " Effective users: for a policy of the arm's weights, by whole orders, if as many requests as these are logged "
        "with this table; `explore evaluate` requires 100."
        if any(arm.effective_users is not None for arm in found.arms)
        else ""
    )
    table = Table(
        title=f"{surface}: {found.requests:,} requests of {found.users:,} users",
        caption=f"Exploration gives up {found.cost:.3%} of predicted utility. Of an arm's requests: the share whose "
        "answer differs, the share withheld beyond regret_max, and the mean regret of the others as a share of their "
        f"value.{effective}",
        caption_justify="left",
    )
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in found.arms:
        table.add_row(
            arm.arm,
            f"{arm.chance:.2%}",
            f"{arm.different:.1%}",
            f"{arm.withheld:.1%}",
            "-" if arm.regret is None else f"{arm.regret:.2%}",
            "-" if arm.effective_users is None else f"{arm.effective_users:,.1f}",
        )
    return table
