"""`pinrank embed evaluate`: what vectors of pins find."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ranker.cli.console import ActionsOption, ConsoleReporter, explained, fail
from ranker.cli.embed.edges import BeforeOption, log_of, say, until_ms_of
from ranker.cli.places import check_file

if TYPE_CHECKING:
    from ranker.embedding.graph.edges import Edges
    from ranker.embedding.retrieval import Questions, Ranks, Retrieval, Scorer
    from ranker.evaluation.bootstrap import Estimate

_POPULARITY = "popularity"
#: What a table of retrieval says nothing about.
_CAVEATS = (
    "held-out pins are the only right answers: one that somebody would have liked, and never saw, counts as wrong",
    "popular pins are held out more often, so recall favours them; the slices tell how rare ones do",
    "recall among all pins is not the order of a ranker's candidates, which `pinrank evaluate` measures",
)


def evaluate(
    vectors: Annotated[
        list[Path], typer.Argument(help="Vectors that `pinrank embed` wrote; the first is compared with the others.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Folder of RecBole atomic files, or ml-1m: users ask with what they liked before --before, and should "
            "find what they liked later.",
        ),
    ] = None,
    known: Annotated[
        Path | None,
        typer.Option(help="Edges to ask with, instead of --data: a Parquet or text file as for `embed walks`."),
    ] = None,
    held: Annotated[Path | None, typer.Option(help="Edges that should be found; with --known.")] = None,
    interests: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Also ask with so many clusters of the known pins, instead of their mean; repeat it for several.",
        ),
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(
            help="Also ask with vectors of users that `pinrank embed users` wrote; the first file is that of its pins."
        ),
    ] = None,
    actions: ActionsOption = None,
    before: BeforeOption = "training",
    contexts_max: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of users or other contexts that ask. Default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of contexts, and of the intervals.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write all numbers to, as JSON.")] = None,
) -> None:
    """Measure how many held-out pins are found among all pins, with the mean of a user's known pins as the question.

    Example: [bold]pinrank embed evaluate new.parquet old.parquet --data data/songs --before training[/]

    Example: [bold]pinrank embed evaluate vectors.parquet --known train.txt --held test.txt[/]
    """
    with explained():
        from ranker.data.users.interests import InterestSettings  # noqa: PLC0415
        from ranker.embedding.retrieval import (  # noqa: PLC0415
            by_interests,
            by_popularity,
            by_users,
            by_vectors,
            questions,
            ranked,
            recall_difference,
            retrieval,
        )
        from ranker.embedding.vector_file import read_user_vectors, read_vectors  # noqa: PLC0415

        if json_path is not None:
            check_file(json_path)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        files = {path.name: read_vectors(path) for path in vectors}
        if len(files) < len(vectors):
            fail("two files have the same name; rename one of them")
        edges = _both(data, known, held, actions, before, reporter)
        until_ms = edges[0].until_ms
        if until_ms is not None:
            for file in files.values():
                file.origin.refuse_after(until_ms)
        own = {name: file.embeddings for name, file in files.items()}
        asked = questions(*edges, [*own.values()], contexts_max, seed)
        scorers: dict[str, Scorer] = {_POPULARITY: by_popularity(asked)}
        scorers |= {name: by_vectors(asked, found) for name, found in own.items()}
        for count in interests or []:
            of_count = InterestSettings(clusters_max=count)
            scorers |= {
                f"{name}, {count} interests": by_interests(asked, found, of_count) for name, found in own.items()
            }
        if users is not None:
            of_users = read_user_vectors(users)
            if until_ms is not None:
                of_users.origin.refuse_after(until_ms)
            scorers[users.name] = by_users(asked, of_users, own[vectors[0].name])
        ranks: dict[str, Ranks] = {}
        for name, scorer in scorers.items():
            with reporter.step(name) as progress:
                ranks[name] = ranked(asked, scorer, progress)
        measured = {name: retrieval(asked, ranks[name], scorers[name], seed) for name in scorers}
        first = vectors[0].name
        against = {
            name: recall_difference(asked, ranks[first], found, 20, seed)
            for name, found in ranks.items()
            if name != first
        }
    _show(asked, measured, first, against)
    if json_path is not None:
        json_path.write_text(json.dumps(_as_json(asked, measured, first, against), indent=2, allow_nan=False) + "\n")


def _both(
    data: str | None,
    known: Path | None,
    held: Path | None,
    actions: Path | None,
    before: str | None,
    reporter: ConsoleReporter,
) -> tuple[Edges, Edges]:
    """Return the edges to ask with, and those to find."""
    from ranker.embedding.graph.edges import LogEdges, edges_in  # noqa: PLC0415

    if known is not None and held is not None and data is None:
        return edges_in(known), edges_in(held)
    if data is None or known is not None or held is not None:
        fail("pass either --data, or both --known and --held")
    log, _ = log_of(data, actions, reporter)
    until_ms = until_ms_of(before, log)
    return LogEdges(log, until_ms), LogEdges(log, None, since_ms=until_ms)


def _show(asked: Questions, measured: Mapping[str, Retrieval], first: str, against: Mapping[str, Estimate]) -> None:
    console = Console(markup=False, emoji=False)
    found = next(iter(measured.values()))
    table = Table(
        title=f"{asked.contexts:,} contexts, {len(asked.held.pins):,} held-out pins among {len(asked.pin_ids):,}; "
        "95% intervals over contexts",
        title_justify="left",
    )
    table.add_column("")
    for cutoff in found.recall:
        table.add_column(f"recall@{cutoff}", justify="right")
    for column in ("MRR", "can be found", "ever in a top 10"):
        table.add_column(column, justify="right")
    for name, one in measured.items():
        numbers = [_shown(estimate) for estimate in (*one.recall.values(), one.mrr)]
        table.add_row(name, *numbers, f"{one.coverage:.1%}", f"{one.shown:.1%}")
    console.print(table)
    slices = Table(title="found in the first 100, by the pin's known edges", title_justify="left")
    slices.add_column("")
    bounds = [*found.slices, None]
    for low, high in pairwise(bounds):
        slices.add_column(
            f"{low} or more" if high is None else "none" if high == 1 else f"{low} to {high - 1}", justify="right"
        )
    for name, one in measured.items():
        slices.add_row(name, *(_shown(estimate) for estimate in one.slices.values()))
    console.print(slices)
    for name, estimate in against.items():
        if estimate.value is not None and estimate.low is not None and estimate.high is not None:
            interval = f"[{estimate.low:+.1%}, {estimate.high:+.1%}]"
            say(f"recall@20 of {first} over {name}: {estimate.value:+.1%} {interval}")
    for caveat in _CAVEATS:
        say(f"not shown: {caveat}")


def _shown(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    interval = "" if estimate.low is None else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{estimate.value:.4f}{interval}"


def _as_json(
    asked: Questions, measured: Mapping[str, Retrieval], first: str, against: Mapping[str, Estimate]
) -> dict[str, Any]:
    return {
        "contexts": asked.contexts,
        "held_out": len(asked.held.pins),
        "candidates": len(asked.pin_ids),
        "scorers": {name: asdict(one) for name, one in measured.items()},
        "recall_at_20_over": {"of": first, **{name: asdict(estimate) for name, estimate in against.items()}},
        "caveats": list(_CAVEATS),
    }
