"""`pinrank impressions stat` and `check`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from impressions.inspection.summary import LogSummary

LogArgument = Annotated[str, typer.Argument(help="Impression log: a folder, file:///... or s3://bucket/prefix.")]
SpoolOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="The servers' impressions.spool_folder, where rows are on their way to files, if it is another than the "
        "folder spool of the log; may be repeated."
    ),
]
#: The days, surfaces and models that are shown, those with most answers.
_SHOWN = 10


def stat(log: LogArgument, spool: SpoolOption = None) -> None:
    """Show what a log holds: rows, users, days, surfaces, models, the explored share, and bytes.

    Rows that are still on their way to a Parquet file are counted, too.

    Example: [bold]pinrank impressions stat /var/lib/pinrank/impressions[/]
    """
    with _explained():
        from impressions.inspection.summary import summarize  # noqa: PLC0415

        summary = summarize(log, spool or ())
    _print_summary(summary, time.time() * 1_000)


def check(log: LogArgument, spool: SpoolOption = None) -> None:
    """Check every file and row of a log, and print each problem with its fix. Exits with 1 if there are any.

    Checked are fingerprints, ids, clocks, lengths, propensities, utilities (to the bit) and orders, and whether actions
    and reports fit the answers that they name. What may be as it should is printed as a note.

    Example: [bold]pinrank impressions check s3://bucket/impressions[/]
    """
    console, problems = Console(markup=False, emoji=False), 0
    notes: list[str] = []
    with _explained():
        from impressions.inspection.check import check_log  # noqa: PLC0415

        for problem in check_log(log, int(time.time() * 1_000), notes.append, spool or ()):
            problems += 1
            console.print(Text.assemble((str(problem), "bold red"), f"\n  fix: {problem.fix}"), soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print("no problems found")


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what is wrong with a log, or with the installation, into one line."""
    try:
        from impressions.errors import LogError  # noqa: PLC0415

        try:
            yield
        except LogError as error:
            _fail(str(error), error)
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        _fail("this command needs pyarrow, which is not installed: pip install 'pinrank[impressions]'", error)


def _fail(message: str, cause: BaseException) -> NoReturn:
    text = Text.assemble(("error: ", "bold red"), message)
    Console(markup=False, emoji=False, stderr=True).print(text, soft_wrap=True)
    raise typer.Exit(1) from cause


def _print_summary(summary: LogSummary, now_ms: float) -> None:
    console = Console(markup=False, emoji=False)
    tables = Table(box=None, pad_edge=False)
    tables.add_column("table")
    for column in ("rows", "files", "MB", "not yet in files", "oldest (UTC)", "newest (UTC)"):
        tables.add_column(column, justify="right")
    for name, one in summary.tables.items():
        waiting = f"{one.segments} segments, {one.segment_bytes / 1e6:,.1f} MB" if one.segments else "-"
        tables.add_row(
            name, f"{one.rows:,}", f"{one.files:,}", f"{one.bytes / 1e6:,.1f}", waiting, _utc(one.oldest_ms),
            _utc(one.newest_ms),
        )  # fmt: skip
    console.print(tables)
    requests = summary.requests
    if requests:
        answers = summary.tables["impressions"]
        size = (answers.bytes + answers.segment_bytes) / requests
        age_s = (now_ms - (answers.newest_ms or 0)) / 1e3
        facts = Table(show_header=False, box=None, pad_edge=False)
        facts.add_row("requests", f"{requests:,} of {summary.users:,} users, {summary.pins / requests:,.1f} pins each")
        facts.add_row("explored", f"{summary.explored:,} ({summary.explored / requests:.2%})")
        facts.add_row("bytes a request", f"{size:,.0f}")
        facts.add_row("newest answer", f"{age_s:,.0f} s ago")
        facts.add_row("days", _most(summary.days))
        facts.add_row("surfaces", _most(summary.surfaces))
        facts.add_row("models", _most(summary.models))
        console.print(facts)
    if summary.set_aside:
        console.print(f"{summary.set_aside} damaged segments were set aside; `pinrank impressions check` names them")


def _most(counts: Counter[str]) -> str:
    shown = ", ".join(f"{name}: {count:,}" for name, count in counts.most_common(_SHOWN))
    return shown if len(counts) <= _SHOWN else f"{shown}, and {len(counts) - _SHOWN} more"


def _utc(time_ms: int | None) -> str:
    return "-" if time_ms is None else f"{datetime.fromtimestamp(time_ms / 1e3, UTC):%Y-%m-%d %H:%M:%S}"
