"""What `pinrank train` learns from, and what the network reads of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranker.cli.console import ActionsOption, DataOption, fail, read_given_vectors
from ranker.cli.options import OptionGroup
from ranker.network.variants import VARIANTS, parse_sizes

if TYPE_CHECKING:
    from ranker.data.shown import Impressions
    from ranker.data.users.rows import UserEncoder
    from ranker.embedding.vector_file import GivenVectors
    from ranker.training.examples import Sampling

_VARIANTS = "; ".join(f"[bold]{name}[/]: {variant.description}" for name, variant in VARIANTS.items())


@dataclass(frozen=True, slots=True)
class DataOptions(OptionGroup):
    panel = "Data"

    data: DataOption = "ml-1m"
    actions: ActionsOption = None
    requests_max: Annotated[
        int | None, typer.Option(min=1, help="Approximate number of training requests, sampled evenly. Default: all.")
    ] = None
    negatives: Annotated[
        int,
        typer.Option(min=1, help="Pins sampled as negatives per training request; each adds a row."),
    ] = 64
    impressions: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `pinrank impressions join` wrote: learn from answered requests and the pins that they "
            "showed, instead of requests and negatives made up of --data. Features still derive from --data."
        ),
    ] = None
    with_unseen: Annotated[
        bool,
        typer.Option("--with-unseen", help="Also learn from shown pins that the user did not look at, as reported."),
    ] = False
    pin_vectors: Annotated[
        Path | None,
        typer.Option(
            help="Vectors of pins, or network.npz, that `pinrank embed` made of events before the training's (--before "
            "training), instead of an SVD. A network makes vectors anew as time goes on. With --parent: of its space."
        ),
    ] = None

    user_vectors: Annotated[
        Path | None,
        typer.Option(
            help="Network that `pinrank embed users` trained (network.npz) on events before the training's (--before "
            "training): the ranker also reads the vector that it makes of a user's last actions."
        ),
    ] = None

    def vectors(self) -> GivenVectors | None:
        return None if self.pin_vectors is None else read_given_vectors(self.pin_vectors)

    def users(self) -> UserEncoder | None:
        if self.user_vectors is None:
            return None
        from ranker.embedding.users.encoder import ModelEncoder  # noqa: PLC0415
        from ranker.embedding.users.network_file import read_network  # noqa: PLC0415

        return ModelEncoder(read_network(self.user_vectors))

    def shown(self) -> Impressions | None:
        from ranker.data.shown import Impressions  # noqa: PLC0415

        if self.impressions is None:
            if self.with_unseen:
                fail("--with-unseen requires --impressions DIR")
            return None
        return Impressions(self.impressions, self.with_unseen)

    def sampling(self) -> Sampling:
        from ranker.training.examples import Sampling  # noqa: PLC0415

        return Sampling(self.negatives, requests_max=self.requests_max)


@dataclass(frozen=True, slots=True)
class NetworkOptions(OptionGroup):
    panel = "Network"

    variant: Annotated[str, typer.Option(help=f"How the network reads the user's last actions. {_VARIANTS}.")] = "late"
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="How many of the user's last actions the network reads. Default: as the variant does."
        ),
    ] = None
    interests: Annotated[
        int,
        typer.Option(
            min=0,
            max=64,
            help="How many of a user's interests the network reads: clusters of the pins that the user liked last.",
        ),
    ] = 0
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Override a network size, e.g. encoder_layers=1, hidden=256,128 or dropout=0.2; may be repeated. "
            "An unknown name lists all sizes.",
        ),
    ] = None

    def sizes(self) -> dict[str, object]:
        return parse_sizes(self.size or [])
