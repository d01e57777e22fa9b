"""`pinrank impressions join`: the command around the join."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from impressions.inspection.commands import SpoolOption

if TYPE_CHECKING:
    import pyarrow as pa

    from impressions.joining.join import Joined
    from impressions.reading import Selection

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_LONGEST_MS = 100 * 365 * 86_400_000
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def join(
    log: Annotated[str, typer.Argument(help="The impression log: a folder, file:///... or s3://bucket/prefix.")],
    window: Annotated[
        str, typer.Option(help="How long after a request an action counts as due to it, e.g. 1800s, 30m, 2h or 1d.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the joined dataset: a new one, or that of an earlier join.")],
    clock_skew: Annotated[
        str, typer.Option(help="An action that seems at most this much earlier than its request counts as at it.")
    ] = "2s",
    actions: Annotated[
        list[Path] | None,
        typer.Option(help="Parquet file of actions that another system recorded; may be repeated."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Join requests from this time on, e.g. 2026-11-01 or 2026-11-01T18:30 (UTC).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Join requests before this time.")] = None,
    surface: Annotated[
        list[str] | None, typer.Option(help="Join requests of this surface only; may be repeated.")
    ] = None,
    spool: SpoolOption = None,
) -> None:
    """Join what was shown with what became of it: a dataset for tuning, evaluation and training.

    The dataset depends on the rows of the log only, not on their order or repetitions. Join again when late actions
    have arrived: the new dataset replaces the old one in one step.

    Example: [bold]pinrank impressions join /var/lib/pinrank/impressions --window 30m --out joined[/]
    """
    try:
        from impressions.errors import LogError  # noqa: PLC0415
        from impressions.joining.action_file import read_action_file  # noqa: PLC0415
        from impressions.joining.attribution import Window  # noqa: PLC0415
        from impressions.joining.join import Wanted, join_log  # noqa: PLC0415
        from impressions.joining.records import Span  # noqa: PLC0415
        from impressions.reading import read_tables  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        _fail("this command needs pyarrow, which is not installed: pip install 'pinrank[impressions]'")

    def read(table: str, needed: Selection) -> Iterable[pa.Table]:
        yield from read_tables(log, table, spool or (), needed)
        if table == "actions":
            yield from more_actions

    try:
        wanted = Wanted(
            Window(duration_ms("--window", window), duration_ms("--clock-skew", clock_skew)),
            Span(_time_ms("--since", since), _time_ms("--until", until)),
            tuple(surface) if surface else None,
        )
        more_actions = [read_action_file(path) for path in actions or []]
        with _Bar() as bar:
            joined = join_log(read, out, wanted, bar.show)
    except (LogError, OSError, ValueError) as error:
        _fail(str(error), error)
    _print_summary(joined, out)


def duration_ms(option: str, text: str) -> int:
    """Parse a duration such as 30m into milliseconds. Raises ValueError, which names the option, for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{option} {text}: write a number and a unit (ms, s, m, h or d) without a sign, e.g. {option} 30m or 1800s"
        )
    milliseconds = float(found[1]) * _UNITS_MS[found[2]]
    if milliseconds > _LONGEST_MS:
        raise ValueError(f"{option} {text}: more than 100 years; write a shorter time, e.g. {option} 30m")
    return round(milliseconds)


def _time_ms(option: str, text: str | None) -> int | None:
    """Parse an ISO time into Unix milliseconds; without an offset, it is in UTC."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: write a date or a time such as 2026-11-01 or 2026-11-01T18:30") from error
    aware = found if found.tzinfo else found.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1_000)


class _Bar:
    """One progress bar per step of the join."""

    def __init__(self) -> None:
        console = Console(stderr=True, markup=False, emoji=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            # A file or pipe gets the last state of the bars only; half a bar says no more than the error that follows.
            self._progress.live.transient = not self._progress.console.is_terminal
        self._progress.stop()

    def show(self, step: str, done: int, total: int) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step)
        self._progress.update(self._tasks[step], completed=done, total=total)


def _print_summary(joined: Joined, out: Path) -> None:
    manifest, counts = joined.manifest, joined.manifest.counts
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    def row(what: str, count: int, note: str = "") -> None:
        table.add_row(what, f"{count:,}", note)

    row("requests", counts.requests, f"{counts.pins:,} pins, {_utc(manifest.first_ms)} to {_utc(manifest.last_ms)} UTC")
    row("  with a report of what was seen", counts.reported_requests)
    if counts.cut_requests:
        row("  cut", counts.cut_requests, f"at their last pin with scores; {counts.cut_pins:,} pins lack them")
    for reason, count in counts.left_out.items():
        row("  left out", count, reason)
    row("actions", counts.actions)
    row("  attributed", counts.attributed, _delays(manifest.delays_ms.get("", {})))
    if counts.before_shown_within_skew:
        row("    before their request", counts.before_shown_within_skew, "within the clock skew")
    for reason, count in counts.unattributed.items():
        row("  not attributed", count, reason.replace("_", " "))
    for what, count, note in (
        ("    by a clock that jumped", counts.jumped_clocks, "received within the window, but dated out of it"),
        ("  sent again with other content", counts.changed_actions, "the one received first counts"),
        ("  out of the span", counts.actions_out_of_span, "in no file"),
        ("repeated rows", joined.repeated_requests + joined.repeated_actions, "counted once"),
        ("seen reports of unknown requests", counts.seen_without_request, ""),
        ("seen positions beyond the answer", counts.seen_beyond_answer, ""),
        ("seen reports of other users", counts.seen_of_other_users, "not counted; the answer was another user's"),
    ):
        if count:
            row(what, count, note)
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"dataset: {out}", highlight=False, soft_wrap=True)


def _delays(quantiles: dict[str, int]) -> str:
    return ", ".join(f"{name} {value / 1_000:.1f} s" for name, value in quantiles.items() if name != "p10")


def _utc(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _fail(message: str, cause: BaseException | None = None) -> NoReturn:
    Console(markup=False, emoji=False, stderr=True).print(
        Text.assemble(("error: ", "bold red"), message), soft_wrap=True
    )
    raise typer.Exit(1) from cause
