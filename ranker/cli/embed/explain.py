"""`pinrank embed similar` and `explain`: vectors of pins, and the interests that they give a user, by title."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ranker.cli.console import ActionsOption, ConsoleReporter, explained, fail, read_dataset
from ranker.cli.embed.edges import BeforeOption, until_ms_of

DataOption = Annotated[
    str, typer.Option("--data", help="Folder of RecBole atomic files, or ml-1m; gives the titles, too.")
]
_SHOWN = 6


def similar(
    vectors: Annotated[Path, typer.Argument(help="Vectors that `pinrank embed` wrote.")],
    data: DataOption,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Pin to look at, as it appears in the files; repeat it. Default: the five most popular."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=100, help="How many similar pins to show.")] = 10,
    actions: ActionsOption = None,
) -> None:
    """Show the pins whose vectors are most similar to a pin's, by title.

    Example: [bold]pinrank embed similar vectors.parquet --data ml-1m --pin 2571[/]
    """
    with explained():
        from ranker.data.atomic.identifiers import token_id  # noqa: PLC0415
        from ranker.embedding.retrieval import most_popular, most_similar  # noqa: PLC0415
        from ranker.embedding.vector_file import read_vectors  # noqa: PLC0415

        own = read_vectors(vectors).embeddings
        dataset = read_dataset(data, actions, ConsoleReporter(Console(markup=False, emoji=False, stderr=True)))
        wanted = [token_id(token) for token in pin] if pin else most_popular(dataset.pins, own, 5)
        for number in wanted:
            found = most_similar(own, number, count)
            table = Table(title=f"similar to {dataset.titles.get(number, str(number))}", title_justify="left")
            table.add_column("cosine", justify="right")
            table.add_column("pin")
            for other, cosine in found:
                table.add_row(f"{cosine:.3f}", dataset.titles.get(other, str(other)))
            Console(markup=False, emoji=False).print(table)


def explain(
    vectors: Annotated[Path, typer.Argument(help="Vectors that `pinrank embed` wrote.")],
    data: DataOption,
    user: Annotated[str, typer.Option(help="User to look at, as the user appears in the files.")],
    clusters: Annotated[int, typer.Option(min=1, max=100, help="How many interests to show.")] = 10,
    distance: Annotated[
        float, typer.Option(min=0, help="Clusters of pins are not merged beyond this distance (Ward's).")
    ] = 1.2,
    half_life_days: Annotated[
        float, typer.Option(min=0.001, help="Age at which a pin weighs half as much as a new one.")
    ] = 30.0,
    actions: ActionsOption = None,
    before: BeforeOption = None,
) -> None:
    """Show a user's interests: clusters of the pins that the user liked, each with the pin that represents it.

    Example: [bold]pinrank embed explain vectors.parquet --data ml-1m --user 4169[/]
    """
    with explained():
        import numpy as np  # noqa: PLC0415

        from ranker.data.actions import action_log  # noqa: PLC0415
        from ranker.data.atomic.identifiers import token_id  # noqa: PLC0415
        from ranker.data.users.interests import InterestSettings, interests_of_user  # noqa: PLC0415
        from ranker.embedding.vector_file import read_vectors  # noqa: PLC0415

        own = read_vectors(vectors).embeddings
        dataset = read_dataset(data, actions, ConsoleReporter(Console(markup=False, emoji=False, stderr=True)))
        log = action_log(dataset)
        place = int(np.searchsorted(log.user_ids, np.uint64(token_id(user))))
        if place == len(log.user_ids) or log.user_ids[place] != token_id(user):
            fail(f"no interaction in {data} is of user {user!r}")
        settings = InterestSettings(distance=distance, clusters_max=clusters, half_life_days=half_life_days)
        found = interests_of_user(log, own, until_ms_of(before, log), settings, place)
        if found is None:
            fail(f"user {user!r} liked no pin that has a vector in {own.space.ref}")
    interests = found.interests
    titles = [dataset.titles.get(int(pin), str(pin)) for pin in log.pin_ids[found.pins]]
    table = Table(title=f"interests of user {user}, from the last {len(titles)} pins", title_justify="left")
    for column in ("importance", "represented by", "pins", "the newest others"):
        table.add_column(column, justify="right" if column in {"importance", "pins"} else "left")
    for cluster, (medoid, importance) in enumerate(zip(interests.medoids, interests.importances, strict=True)):
        members = np.flatnonzero(interests.clusters == cluster)
        others = [titles[member] for member in members if member != medoid][:_SHOWN]
        table.add_row(f"{importance:.1%}", titles[medoid], str(len(members)), ", ".join(others))
    Console(markup=False, emoji=False).print(table)
