"""`pinrank embed follow`: keeps the vectors of pins in a feature store up with what users do."""

from __future__ import annotations

import asyncio
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ranker.cli.console import (
    ActionsOption,
    ConsoleReporter,
    explained,
    fail,
    read_dataset,
    read_given_vectors,
    read_version,
)
from ranker.cli.embed.edges import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from feature_client.groups import FeatureGroup
    from feature_client.stores.store import Store
    from ranker.data.actions import ActionLog
    from ranker.embedding.pins.as_of import NetworkVectors
    from ranker.embedding.pins.follow import Follower


def follow(
    folder: Annotated[str, typer.Argument(help="Folder of RecBole atomic files, which is read again in each round.")],
    network: Annotated[Path, typer.Option(help="network.npz of `pinrank embed pins`.")],
    store: Annotated[str, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.")],
    model: Annotated[str, typer.Option(help="Version that reads the vectors: NAME@VERSION or NAME@LABEL.")],
    feature_store: Annotated[
        str, typer.Option(help="Feature store to write to: lmdb:///FOLDER or redis://HOST:PORT/0.")
    ],
    every_min: Annotated[float, typer.Option(min=0.01, help="Minutes from one round to the next.")] = 10.0,
    actions: ActionsOption = None,
    impressions: Annotated[
        Path | None,
        typer.Option(help="Folder that `pinrank impressions join` keeps writing: its actions count, too."),
    ] = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the first round, which writes every pin.")] = False,
) -> None:
    """Make the vectors of pins that new actions touch, and write them where the next request reads them.

    The network and its embedding space stay, so rankers need no training. A pin that did not exist when the network was
    trained has a vector from the first action on it. The first round writes every pin, each later one the rows that
    have changed, each row whole. A round that fails is reported, and made again in the next one.

    Example: [bold]pinrank embed follow my-data --network pins/network.npz --store models --model mine@stable
    --feature-store redis://HOST:6379/0 --every-min 10[/]
    """
    with explained():
        from feature_client.stores.open_store import open_store  # noqa: PLC0415
        from feature_client.stores.store import StoreError  # noqa: PLC0415
        from model_store.registry.store import open_model_store  # noqa: PLC0415
        from ranker.embedding.pins.as_of import NetworkVectors  # noqa: PLC0415
        from ranker.embedding.pins.follow import Follower  # noqa: PLC0415

        vectors = read_given_vectors(network)
        if not isinstance(vectors, NetworkVectors):
            fail(f"{network} holds vectors, which cannot follow anything; pass a network.npz of `pinrank embed pins`")
        group = _group(open_model_store(store), model, vectors)
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))

        def read() -> ActionLog:
            from ranker.data.actions import action_log  # noqa: PLC0415
            from ranker.data.shown import Impressions, read_shown  # noqa: PLC0415

            log = action_log(read_dataset(folder, actions, reporter))
            return log if impressions is None else read_shown(Impressions(impressions), log).history

        async def run() -> bool:
            target = open_store(feature_store, lasting=True)
            await target.start()
            try:
                return await _rounds(target, group, Follower(vectors, group), read, None if once else every_min * 60)
            finally:
                await target.close()

        try:
            done = asyncio.run(run())
        except StoreError as error:
            fail(str(error))
    if not done:
        raise typer.Exit(1)


def _group(models: object, model: str, vectors: NetworkVectors) -> FeatureGroup:
    """Return the group of pins that a version reads. It must be of the network's space."""
    from feature_client.groups import Embedding  # noqa: PLC0415
    from ranker.data.features import Groups  # noqa: PLC0415

    bundle = read_version(models, model)  # type: ignore[arg-type]  # a model store, which is imported on use
    group = Groups.served_by(bundle.manifest).pin
    field = group.field("embedding")
    if not isinstance(field, Embedding) or field.space != vectors.space:
        theirs = field.space.ref if isinstance(field, Embedding) else "no embedding"
        fail(
            f"the network makes vectors of {vectors.space.ref}, and {bundle.manifest.ref} reads {theirs}; train a "
            "ranker on the former (pinrank train --pin-vectors network.npz)"
        )
    return group


async def _rounds(
    store: Store, group: FeatureGroup, follower: Follower, read: Callable[[], ActionLog], every_s: float | None
) -> bool:
    """Follow until a signal to stop; return whether the last round succeeded. `every_s` None makes one round."""
    from feature_client.bulk.write import ForeignValuesError, refuse_foreign, write_rows  # noqa: PLC0415
    from feature_client.stores.store import StoreError  # noqa: PLC0415
    from ranker.errors import RankerError  # noqa: PLC0415

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    done = False
    while not stop.is_set():
        begun_s = time.monotonic()
        try:
            log = await asyncio.to_thread(read)
            before_ms = int(log.time_ms[-1]) + 1
            found = await asyncio.to_thread(follower.follow, log, before_ms)
            await refuse_foreign(store, group, found.pin_ids)
            written = await write_rows(store, group, found.pin_ids, found.rows)
            done = True
            when = datetime.fromtimestamp((before_ms - 1) / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%S")
            say(
                f"{found.users:,} users with new actions, up to {when} UTC, touch {found.touched:,} pins: wrote "
                f"{written:,} rows in {time.monotonic() - begun_s:.1f} s"
            )
        except ForeignValuesError as error:
            fail(str(error))
        except (StoreError, RankerError, OSError) as error:
            done = False
            follower.forget_rows()
            Console(markup=False, emoji=False, stderr=True).print(
                f"this round failed, and the next one writes every pin: {error}", highlight=False, soft_wrap=True
            )
        if every_s is None:
            break
        try:
            await asyncio.wait_for(stop.wait(), max(0.0, every_s - (time.monotonic() - begun_s)))
        except TimeoutError:
            continue
    return done
