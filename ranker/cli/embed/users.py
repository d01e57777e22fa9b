"""`pinrank embed users` and `user-vectors`: vectors of users, from the order of their last actions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.cli.console import ActionsOption, ConsoleReporter, explained, fail
from ranker.cli.embed.edges import BeforeOption, command_line, log_of, say, until_ms_of
from ranker.cli.places import check_file, check_folder

if TYPE_CHECKING:
    from ranker.data.actions import ActionLog
    from ranker.data.embeddings import PinEmbeddings
    from ranker.embedding.users.model import UserModel

_NETWORK, _USERS, _PINS, _GROUP = "network.npz", "users.parquet", "pins.parquet", "group.json"

DataArgument = Annotated[
    str,
    typer.Argument(
        help="Folder of RecBole atomic files, or ml-1m; or a text file (.txt) with a line for each user: the user's "
        "number, and those of the pins, oldest first. Such a file has no times."
    ),
]
PinsOption = Annotated[
    Path | None,
    typer.Option("--pins", help="Vectors of pins that `pinrank embed` wrote, for the network to read."),
]


class LossName(StrEnum):
    """Which actions of a sequence predict which later ones."""

    NEXT = "next"
    ALL = "all"
    DENSE = "dense"


def users(
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="Folder to write the network, the vectors and their group to.")],
    pins: PinsOption = None,
    loss: Annotated[
        LossName,
        typer.Option(
            help="[bold]next[/]: each action predicts the next one. [bold]all[/]: one action of each sequence predicts "
            "all within the horizon. [bold]dense[/]: each action does."
        ),
    ] = LossName.DENSE,
    horizon_days: Annotated[float, typer.Option(min=0.01, help="How far ahead actions predict.")] = 28.0,
    horizon_actions: Annotated[int, typer.Option(min=1, help="The same, for data without times.")] = 64,
    length_max: Annotated[int, typer.Option(min=1, max=4096, help="Last actions of a user to read.")] = 256,
    dim: Annotated[int, typer.Option(min=2, max=4096, help="Numbers of a vector.")] = 64,
    layers: Annotated[int, typer.Option(min=1, max=64, help="Transformer layers.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="How often each sequence is read in training.")] = 10,
    rate: Annotated[float, typer.Option(min=1e-6, max=1, help="Learning rate.")] = 3e-3,
    table: Annotated[
        bool,
        typer.Option(
            "--table/--no-table", help="Learn a vector of each pin, besides the given ones. New pins have none."
        ),
    ] = True,
    name: Annotated[str | None, typer.Option(help="Name of the space's dataset (default: that of the data).")] = None,
    actions: ActionsOption = None,
    before: BeforeOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Train a network that gives each user one vector, and write the vectors of all users and pins.

    A causal transformer reads a user's last actions, oldest first: their pins, what the user did, and when. Its vector
    predicts what the user will like within the horizon. `user-vectors` computes the vectors anew as actions come in.

    Example: [bold]pinrank embed users data/songs --pins vectors.parquet --out users --before training[/]
    """
    with explained():
        from ranker.embedding.users.fit import FitSettings  # noqa: PLC0415
        from ranker.embedding.users.model import train_users  # noqa: PLC0415
        from ranker.embedding.users.network_file import write_network  # noqa: PLC0415
        from ranker.embedding.users.user_vectors import daily_vectors, vectors_of_pins  # noqa: PLC0415
        from ranker.embedding.vector_file import VectorsOrigin, write_user_vectors, write_vectors  # noqa: PLC0415

        if dim % 2:
            fail(f"--dim {dim} is odd, and two attention heads share the numbers; choose an even number")
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        settings = FitSettings(
            loss=loss.value,
            horizon_days=horizon_days,
            horizon_actions=horizon_actions,
            length_max=length_max,
            dim=dim,
            layers=layers,
            epochs=epochs,
            rate=rate,
            table=table,
            seed=seed,
        )
        log, dataset_name, timed = _log(data, actions, before, reporter)
        until_ms = until_ms_of(before, log)
        given = _pin_vectors(pins, until_ms, timed)
        check_folder(out)
        with reporter.step("network") as progress:
            model = train_users(log, given, until_ms, settings, name or dataset_name, timed=timed, progress=progress)
        with reporter.step("vectors") as progress:
            found = daily_vectors(model, log, given, until_ms, command_line(), progress=progress)
        of_pins = vectors_of_pins(model, log.pin_ids, given)
        out.mkdir(parents=True, exist_ok=True)
        write_network(out / _NETWORK, model)
        write_user_vectors(out / _USERS, found)
        origin = VectorsOrigin(space=model.space, until_ms=model.until_ms, made_by=command_line())
        write_vectors(out / _PINS, of_pins, origin)
        _write_group(out / _GROUP, model)
    say(f"wrote the vectors of {len(found.user_ids):,} users in {model.space.ref}, and their network, to {out}")


def user_vectors(
    network: Annotated[Path, typer.Argument(help="Network that `pinrank embed users` wrote.")],
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    pins: PinsOption = None,
    previous: Annotated[
        Path | None,
        typer.Option(help="Vectors of an earlier time: only users with actions since are computed anew."),
    ] = None,
    actions: ActionsOption = None,
    before: BeforeOption = None,
) -> None:
    """Compute the vectors of users as of a time, with a network that was trained before.

    With --previous, users without an action since those vectors keep theirs. The result is the same as without it.

    Example: [bold]pinrank embed user-vectors users/network.npz data/songs --pins vectors.parquet --out today.parquet
    --previous users/users.parquet[/]
    """
    with explained():
        from ranker.data.problems import date_of  # noqa: PLC0415
        from ranker.embedding.users.network_file import read_network  # noqa: PLC0415
        from ranker.embedding.users.user_vectors import daily_vectors  # noqa: PLC0415
        from ranker.embedding.vector_file import read_user_vectors, write_user_vectors  # noqa: PLC0415

        check_file(out)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        model = read_network(network)
        log, _, timed = _log(data, actions, before, reporter)
        if timed != model.network.sizes.timed:
            trained, has = ("without", "some") if timed else ("with", "none")
            fail(f"{network} was trained on data {trained} times, and {data} has {has}; pass data of the same kind")
        until_ms = until_ms_of(before, log)
        if model.until_ms is not None and model.until_ms > until_ms:
            fail(
                f"{network} was trained on events until {date_of(model.until_ms)}, so vectors as of "
                f"{date_of(until_ms)} would know what comes later; choose a later --before, or train again with an "
                "earlier one"
            )
        earlier = None if previous is None else read_user_vectors(previous)
        given = _pin_vectors(pins, until_ms, timed)
        with reporter.step("vectors") as progress:
            found = daily_vectors(model, log, given, until_ms, command_line(), earlier, progress)
        write_user_vectors(out, found)
    say(f"wrote the vectors of {len(found.user_ids):,} users in {model.space.ref} to {out}")


def _log(data: str, actions: Path | None, before: str | None, reporter: ConsoleReporter) -> tuple[ActionLog, str, bool]:
    """Return a log, its name, and whether it has times."""
    from ranker.embedding.graph.edges import edges_in  # noqa: PLC0415
    from ranker.embedding.users.sequences import ordered_log  # noqa: PLC0415

    path = Path(data)
    if not path.is_file():
        return *log_of(data, actions, reporter), True
    if before is not None or actions is not None:
        fail(f"{path} has no times and no actions; leave out --before and --actions")
    return ordered_log(edges_in(path)), path.stem, False


def _pin_vectors(pins: Path | None, until_ms: int, timed: bool) -> PinEmbeddings | None:
    """Return the given vectors of pins, which may know no event from `until_ms` on."""
    from ranker.embedding.vector_file import read_vectors  # noqa: PLC0415

    if pins is None:
        return None
    found = read_vectors(pins)
    if timed:
        found.refuse_after(until_ms)
    return found.embeddings


def _write_group(path: Path, model: UserModel) -> None:
    """Describe the group of users as which `pinrank features load` loads their vectors."""
    from ranker.data.users.rows import vector_group  # noqa: PLC0415

    path.write_text(vector_group(model.space).model_dump_json(indent=2) + "\n", encoding="utf-8")
