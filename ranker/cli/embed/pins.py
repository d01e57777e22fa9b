"""`pinrank embed pins`: trains a network over pins and their neighbours, and makes vectors with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from ranker.cli.console import ConsoleReporter, explained, fail
from ranker.cli.embed.edges import command_line, say

if TYPE_CHECKING:
    from ranker.embedding.pins.training import PinEpoch

_NETWORK = "network.npz"
_NETWORK_PANEL, _TRAINING_PANEL = "Network", "Training"
#: What says something to a command that trains nothing.
_WITH_A_NETWORK = {"neighbourhoods", "graph", "out", "network"}


def pins(
    context: typer.Context,
    neighbourhoods: Annotated[Path, typer.Argument(help="Folder that `pinrank embed materialise` wrote.")],
    graph: Annotated[
        Path, typer.Option("--graph", help="Folder that `pinrank embed walks` wrote: its contexts are the examples.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the network, network.npz, and a Parquet file of vectors for each task.")
    ],
    network: Annotated[
        Path | None,
        typer.Option(help="Train nothing: make vectors with this network, in its spaces. Pins may be newer than it."),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="TOML file of what the vectors are trained for. Default: contexts of the graph (co-save)."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the embedding spaces, before that of the task.")] = "pins",
    variant: Annotated[
        Literal["khop", "pooled", "transformer"],
        typer.Option(
            help="How neighbours are read: means over one and two hops, drawn anew each time; the mean by the visits "
            "of the walks; or a transformer besides that mean.",
            rich_help_panel=_NETWORK_PANEL,
        ),
    ] = "transformer",
    dim: Annotated[
        int,
        typer.Option(
            min=2, max=1_024, help="Numbers of a vector that the network makes.", rich_help_panel=_NETWORK_PANEL
        ),
    ] = 64,
    trained_dim: Annotated[
        int,
        typer.Option(
            min=0,
            max=1_024,
            help="Numbers of the vector that is trained for each pin; 0 for none. New pins have only features and "
            "neighbours.",
            rich_help_panel=_NETWORK_PANEL,
        ),
    ] = 64,
    layers: Annotated[int, typer.Option(min=1, max=8, help="Of the transformer.", rich_help_panel=_NETWORK_PANEL)] = 1,
    keep_features: Annotated[
        bool,
        typer.Option(
            "--keep-features",
            help="Begin each vector with the pin's features, so that it says what both say. It is as much longer.",
            rich_help_panel=_NETWORK_PANEL,
        ),
    ] = False,
    own_dropped: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the pins whose own features, or own trained vector, training leaves out: the more, the "
            "better the vectors of new pins.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = 0.25,
    epochs: Annotated[int, typer.Option(min=1, help="Maximum number of epochs.", rich_help_panel=_TRAINING_PANEL)] = 20,
    patience: Annotated[
        int,
        typer.Option(
            min=1,
            help="Epochs without a lower loss on held-out examples after which training ends.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = 2,
    batch: Annotated[
        int, typer.Option(min=2, help="Examples of each task in a step.", rich_help_panel=_TRAINING_PANEL)
    ] = 1_024,
    learning_rate: Annotated[
        float, typer.Option(min=1e-7, max=1, help="Of Adam.", rich_help_panel=_TRAINING_PANEL)
    ] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.", rich_help_panel=_TRAINING_PANEL)] = 0,
) -> None:
    """Train a network that makes a pin's vector of its own features and those of its neighbours (PinSage).

    A random part of the pins of a context, such as a user or a board, should find the rest of them among all pins. A
    new pin has a vector as soon as it has an edge or features: walk and materialise again, and pass --network.

    Example: [bold]pinrank embed pins neighbourhoods --graph neighbours --out pins[/]

    Example: [bold]pinrank embed pins neighbourhoods --graph neighbours --tasks tasks.toml --out pins[/]

    Example: [bold]pinrank embed pins newer --graph newer-neighbours --network pins/network.npz --out newer-pins[/]
    """
    with explained():
        from ranker.embedding.graph.graph import open_graph  # noqa: PLC0415
        from ranker.embedding.graph.materialised import open_neighbourhoods  # noqa: PLC0415
        from ranker.embedding.graph.neighbours import graph_folder, open_neighbours, walk_settings_in  # noqa: PLC0415
        from ranker.embedding.pins.network import PinNetworkSettings  # noqa: PLC0415
        from ranker.embedding.pins.producer import train_producer  # noqa: PLC0415
        from ranker.embedding.pins.tasks import CO_SAVE, read_tasks  # noqa: PLC0415
        from ranker.embedding.pins.trained import read_network, vectors_of, write_network  # noqa: PLC0415
        from ranker.embedding.pins.training import PinTraining  # noqa: PLC0415
        from ranker.embedding.vector_file import VectorsOrigin, latest_ms, write_vectors  # noqa: PLC0415

        if network is not None and (needless := _given(context, besides=_WITH_A_NETWORK)):
            fail(f"--network trains nothing, so leave out {', '.join(needless)}")
        if (out / _NETWORK).exists():
            fail(f"{out / _NETWORK} exists; choose another folder, or remove it")
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        files, edges = open_neighbourhoods(neighbourhoods), open_graph(graph_folder(graph))
        if network is None:
            sizes = PinNetworkSettings(
                variant=variant,
                dim=dim,
                trained_dim=trained_dim,
                layers=layers,
                own_dropped=own_dropped,
                features_kept=keep_features,
            )
            settings = PinTraining(epochs, patience, batch, learning_rate, seed)
            wanted, folder = (read_tasks(tasks), tasks.parent) if tasks is not None else (CO_SAVE, Path())
            with reporter.step("training") as progress:
                trained = train_producer(
                    name,
                    files,
                    edges,
                    walk_settings_in(open_neighbours(graph)),
                    wanted,
                    folder,
                    sizes,
                    settings,
                    command_line(),
                    progress,
                    lambda epoch: reporter.note(_described(epoch)),
                )
        else:
            trained = read_network(network)
        with reporter.step("vectors") as progress:
            found = vectors_of(trained, files, edges, progress)
        out.mkdir(parents=True, exist_ok=True)
        until_ms = latest_ms(trained.about.until_ms, files.until_ms)
        for task, vectors in found.items():
            origin = VectorsOrigin(space=vectors.space, until_ms=until_ms, made_by=command_line())
            write_vectors(out / f"{task}.parquet", vectors, origin)
        if network is None:
            write_network(out / _NETWORK, trained)
    for task, vectors in found.items():
        say(f"wrote vectors of {len(vectors.pin_ids):,} pins in {vectors.space.ref} to {out / task}.parquet")


def _given(context: typer.Context, besides: set[str]) -> list[str]:
    """Return the options that the command line names, besides some."""
    found = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name not in besides and source is not None and source.name == "COMMANDLINE":
            found.append(option.opts[0])
    return found


def _described(epoch: PinEpoch) -> str:
    held = ", ".join(f"{task} {loss:.4f}" for task, loss in epoch.held_out.items())
    return f"epoch {epoch.number}: training loss {epoch.loss:.4f}{held and f', of held-out examples {held}'}"
