"""What the commands of `pinrank embed` share: the options for events and edges, and how these are read."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.cli.console import ConsoleReporter, fail, note_problems, read_dataset

if TYPE_CHECKING:
    from ranker.data.actions import ActionLog
    from ranker.embedding.graph.edges import Edges

BeforeOption = Annotated[
    str | None,
    typer.Option(
        "--before",
        help="Read only events before this time: a date such as 2026-03-31 (UTC), or [bold]training[/] for the end of "
        "the window that `pinrank train` gives its own producer of vectors.",
    ),
]
_TRAINING = "training"


def log_of(folder: str, actions: Path | None, reporter: ConsoleReporter) -> tuple[ActionLog, str]:
    """Read a dataset; return its log and its name."""
    from ranker.data.actions import action_log  # noqa: PLC0415

    dataset = read_dataset(folder, actions, reporter)
    note_problems(dataset, reporter)
    return action_log(dataset), dataset.name


def edges_of(text: str, actions: Path | None, before: str | None, reporter: ConsoleReporter) -> Edges:
    """Return the edges of a dataset's folder, or of a file, whose edges have no times."""
    from ranker.embedding.graph.edges import LogEdges, edges_in  # noqa: PLC0415

    path = Path(text)
    if path.is_file():
        if before is not None or actions is not None:
            fail(f"{path} has no times and no actions; leave out --before and --actions")
        return edges_in(path)
    log, _ = log_of(text, actions, reporter)
    return LogEdges(log, until_ms_of(before, log))


def until_ms_of(before: str | None, log: ActionLog) -> int:
    """Return the end of the window that --before names, in Unix milliseconds; without it, that of all events."""
    from ranker.data.requests import Split, producer_until_ms  # noqa: PLC0415

    if before is None:
        return int(log.time_ms[-1]) + 1
    if before == _TRAINING:
        return producer_until_ms(log, Split())
    try:
        time = datetime.fromisoformat(before)
    except ValueError:
        fail(f"--before {before} is no date; write one such as 2026-03-31 or 2026-03-31T12:00, or {_TRAINING}")
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1e3)


def command_line() -> str:
    """Return the command that runs, as it would be typed."""
    return shlex.join(["pinrank", *sys.argv[1:]])


def say(text: str) -> None:
    Console(markup=False, emoji=False).print(text, highlight=False, soft_wrap=True)
