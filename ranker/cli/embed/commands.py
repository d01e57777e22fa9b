"""`pinrank embed`: makes vectors of pins and users, and moves refreshed ones into the space that rankers read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.cli.console import ActionsOption, ConsoleReporter, explained, fail, read_version
from ranker.cli.embed.edges import BeforeOption, command_line, edges_of, log_of, say, until_ms_of
from ranker.cli.embed.evaluate import evaluate
from ranker.cli.embed.explain import explain, similar
from ranker.cli.embed.follow import follow
from ranker.cli.embed.pins import pins
from ranker.cli.embed.users import user_vectors, users
from ranker.cli.embed.where import OnOption, engine_of, join_of
from ranker.cli.places import check_file

if TYPE_CHECKING:
    from model_store.registry.store import ModelStore
    from ranker.embedding.alignment import Alignment
    from ranker.embedding.vector_file import SavedVectors


def register(app: typer.Typer) -> None:
    """Add `embed` to the `pinrank` command."""
    commands = typer.Typer(
        no_args_is_help=True, help="Make vectors of pins and users, and refresh those that rankers read."
    )
    commands.command()(svd)
    commands.command()(walks)
    commands.command()(fold)
    commands.command()(materialise)
    commands.command()(pins)
    commands.command()(follow)
    commands.command()(evaluate)
    commands.command()(similar)
    commands.command()(explain)
    commands.command()(align)
    commands.command()(users)
    commands.command()(user_vectors)
    app.add_typer(commands, name="embed")


def svd(
    folder: Annotated[str, typer.Argument(help="Folder of RecBole atomic files, or ml-1m.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the space's dataset (default: that of the data).")] = None,
    actions: ActionsOption = None,
    before: BeforeOption = None,
    dim: Annotated[int, typer.Option(min=2, max=1_024, help="Numbers of a vector.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the solver.")] = 0,
) -> None:
    """Fit the vectors that `pinrank train` fits by itself: a truncated SVD of users' actions on pins.

    Longer vectors tell more pins apart, where many of them are new: `pinrank train --pin-vectors` ranks with them.

    Example: [bold]pinrank embed svd data/deskdrop --out vectors.parquet --before training[/]

    Example: [bold]pinrank embed svd data/deskdrop --dim 64 --out vectors.parquet --before training[/]
    """
    with explained():
        from ranker.data.embeddings import svd_embeddings  # noqa: PLC0415
        from ranker.embedding.vector_file import VectorsOrigin, write_vectors  # noqa: PLC0415

        check_file(out)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        log, dataset_name = log_of(folder, actions, reporter)
        until_ms = until_ms_of(before, log)
        with reporter.step("embeddings"):
            found = svd_embeddings(log, until_ms, seed, name or dataset_name, dim)
        write_vectors(out, found, VectorsOrigin(space=found.space, until_ms=until_ms, made_by=command_line()))
    say(f"wrote vectors of {len(found.pin_ids):,} pins in {found.space.ref} to {out}")


def walks(
    edges: Annotated[
        str,
        typer.Argument(
            help="Folder of RecBole atomic files, or ml-1m; a Parquet file with the columns context_id and pin_id; or "
            "a text file (.txt) with a line for each context: its number, and those of its pins."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the graph and the neighbours; a run goes on where it ended.")],
    actions: ActionsOption = None,
    before: BeforeOption = None,
    walks: Annotated[int, typer.Option(min=1, max=100_000, help="Walks from each pin.")] = 200,
    restart: Annotated[float, typer.Option(min=0.05, max=1, help="Probability that a walk ends after a step.")] = 0.5,
    neighbours: Annotated[int, typer.Option(min=1, max=1_000, help="Most visited pins to keep.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the walks.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1_024, help="Processes that walk (default: one for each core).")
    ] = None,
    on: OnOption = None,
) -> None:
    """Find the neighbours of every pin by random walks over the graph of pins and what they share.

    A walk goes from a pin to a context of it, such as a user or a board, and on to a pin of that context. The pins that
    the walks from a pin visit most are its neighbours. The result is the same for any number of processes, and on Ray.

    Example: [bold]pinrank embed walks data/deskdrop --out neighbours --before training[/]

    Example: [bold]pinrank embed walks board-pins.parquet --out neighbours --processes 8[/]
    """
    with explained():
        from kernels.cores import cores  # noqa: PLC0415
        from ranker.embedding.graph.graph import build_graph  # noqa: PLC0415
        from ranker.embedding.graph.neighbours import graph_folder, make_neighbours  # noqa: PLC0415
        from ranker.embedding.graph.walks import WalkSettings  # noqa: PLC0415

        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        if on is not None and processes is not None:
            fail("--on ray uses all cores of its cluster; leave out --processes")
        settings, out = WalkSettings(walks, restart, neighbours, seed), out.absolute()
        source = edges_of(edges, actions, before, reporter)
        with engine_of(on, out) as engine:
            with reporter.step("graph") as progress:
                graph = build_graph(graph_folder(out), source, progress)
            with reporter.step("walks") as progress:
                made = make_neighbours(out, settings, processes or cores(), progress, engine)
    say(f"wrote the neighbours of {made.pins:,} pins, of {graph.edges:,} edges, to {out}")


def fold(
    folder: Annotated[str, typer.Argument(help="Folder of RecBole atomic files, or ml-1m.")],
    vectors: Annotated[Path, typer.Option(help="Vectors of pins that `pinrank embed` wrote.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write, in the same space.")],
    actions: ActionsOption = None,
    before: BeforeOption = None,
) -> None:
    """Add vectors of newer pins to a file: each is the mean of the users who liked it, and a user is that of the pins.

    The vectors that are there stay. `pinrank train` and `data fill` do this by themselves; it is for features of
    neighbourhoods, so that a network of pins knows something of newer ones.

    Example: [bold]pinrank embed fold data/songs --vectors vectors.parquet --out newer.parquet[/]
    """
    with explained():
        from ranker.data.folding import folded_vectors  # noqa: PLC0415
        from ranker.embedding.vector_file import read_vectors, write_vectors  # noqa: PLC0415

        check_file(out)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        log, _ = log_of(folder, actions, reporter)
        until_ms = until_ms_of(before, log)
        saved = read_vectors(vectors)
        found = folded_vectors(log, saved.embeddings, until_ms)
        latest_ms = max(until_ms, saved.origin.until_ms or 0)
        changed = {"until_ms": latest_ms, "revision": saved.origin.revision + 1, "made_by": command_line()}
        write_vectors(out, found, saved.origin.model_copy(update=changed))
    added = len(found.pin_ids) - len(saved.embeddings.pin_ids)
    say(f"wrote vectors of {len(found.pin_ids):,} pins in {found.space.ref} to {out}; {added:,} of them are new")


def materialise(
    neighbours: Annotated[Path, typer.Argument(help="Folder that `pinrank embed walks` wrote.")],
    features: Annotated[
        list[Path],
        typer.Option(
            help="Vectors of pins that `pinrank embed` wrote, as their features; repeat it for several files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result; a run goes on where it ended.")],
    on: OnOption = None,
) -> None:
    """Join every pin and its neighbours with their features, into files that are read from front to end.

    On this machine, all features are in memory. With --on ray, no machine has all of them.

    Example: [bold]pinrank embed materialise neighbours --features vectors.parquet --out neighbourhoods[/]
    """
    with explained():
        from ranker.embedding.graph.materialised import make_neighbourhoods  # noqa: PLC0415
        from ranker.embedding.graph.neighbours import open_neighbours  # noqa: PLC0415

        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        parts, out = open_neighbours(neighbours.absolute()), out.absolute()
        with join_of(on, parts, features, out) as (origins, join), reporter.step("neighbourhoods") as progress:
            made = make_neighbourhoods(parts, origins, out, join, progress)
    say(f"wrote the neighbourhoods of {made.pins:,} pins to {out}")


def align(
    new: Annotated[Path, typer.Argument(help="Vectors of the new training: a file that `pinrank embed` wrote.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="Vectors that they shall replace: such a file, or NAME@VERSION or NAME@LABEL with --store."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write, in the old space.")],
    store: Annotated[str | None, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.")] = None,
    mean_cosine_min: Annotated[
        float, typer.Option(min=-1, max=1, help="Least mean cosine of a pin's new vector with its old one.")
    ] = 0.95,
    moved_share_max: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of pins whose cosine is below 0.9.")
    ] = 0.1,
) -> None:
    """Rotate refreshed vectors into the space of earlier ones, so that rankers can go on reading them.

    Two trainings give vectors that differ by a rotation, even on the same data. If the pins themselves have moved
    little, the rotated vectors are a revision of the old space: the rankers that read it need no training. Otherwise,
    nothing is written, and the exit status is 1: the vectors are a new space, for which a ranker must be trained.
    Vectors that the same network made (embed pins --network) need no rotation, and are judged by the same limits.

    Example: [bold]pinrank embed align new.parquet --to ml1m@stable --store models --out refreshed.parquet[/]
    """
    with explained():
        from model_store.registry.store import open_model_store  # noqa: PLC0415
        from ranker.embedding.alignment import Limits, align, aligned  # noqa: PLC0415
        from ranker.embedding.vector_file import VectorsOrigin, read_vectors, write_vectors  # noqa: PLC0415

        check_file(out)
        models = open_model_store(store) if store is not None else None
        fresh, old = read_vectors(new), _old_vectors(to, models)
        own, theirs = fresh.embeddings, old.embeddings
        limits = Limits(mean_cosine_min, moved_share_max)
        found = align(own, theirs)
        say(_described(found, fresh, old))
        beyond = found.exceeds(limits)
        if beyond:
            _refuse(beyond, fresh, old, models)
        origin = VectorsOrigin(
            space=theirs.space,
            until_ms=fresh.origin.until_ms,
            revision=old.origin.revision + 1,
            made_by=command_line(),
            made_of="" if own.space == theirs.space else own.space.ref,
        )
        write_vectors(out, aligned(own, found.rotation, theirs.space), origin)
    say(f"wrote revision {origin.revision} of {theirs.space.ref} to {out}; the rankers that read it need no training")


def _described(found: Alignment, new: SavedVectors, old: SavedVectors) -> str:
    from ranker.embedding.alignment import MOVED_BELOW  # noqa: PLC0415

    after, how = "after the rotation", "; each was judged by a rotation that was fitted without it"
    if new.origin.space == old.origin.space:
        after, how = "in the space of both", ""
    return (
        f"{found.shared:,} pins have a vector in both, {found.new:,} only in {new.origin.space.ref}, "
        f"{found.gone:,} only in {old.origin.space.ref}\n"
        f"{after}, the mean cosine of a pin's two vectors is {found.mean_cosine:.3f}, and {found.moved_share:.1%} of "
        f"the pins are below {MOVED_BELOW:g}{how}"
    )


def _refuse(beyond: list[str], new: SavedVectors, old: SavedVectors, models: ModelStore | None) -> None:
    """Say that the vectors are of a new space, and who would have to move to it."""
    own, theirs = new.origin.space, old.origin.space
    readers = _readers(models, theirs.ref) if models is not None else []
    who = f"; {', '.join(readers)} read {theirs.ref}" if readers else ""
    fail(
        f"{own.ref} is a new space, not a refresh of {theirs.ref}: {'; '.join(beyond)}. Nothing was written. Train a "
        f"ranker on it (pinrank train --pin-vectors FILE){who}, and `pinrank model diff` says who must move with it. "
        "--mean-cosine-min and --moved-share-max set the limits"
    )


def _readers(models: ModelStore, space: str) -> list[str]:
    """Return the labelled versions that read vectors of a space."""
    from feature_client.groups import Embedding  # noqa: PLC0415

    found = []
    for name in models.models():
        for label, version in models.labels(name).items():
            fields = (field for group in models.manifest(name, version).groups for field in group.fields)
            if any(isinstance(field, Embedding) and field.space.ref == space for field in fields):
                found.append(f"{name}@{label}")
    return found


def _old_vectors(text: str, models: ModelStore | None) -> SavedVectors:
    from ranker.data.embeddings import embeddings_of  # noqa: PLC0415
    from ranker.embedding.vector_file import SavedVectors, VectorsOrigin, read_vectors  # noqa: PLC0415

    if "@" not in text or Path(text).exists():
        return read_vectors(Path(text))
    if models is None:
        fail(f"--to {text} names a version in a model store; add --store DIR")
    found = embeddings_of(read_version(models, text))
    return SavedVectors(found, VectorsOrigin(space=found.space, until_ms=None))
