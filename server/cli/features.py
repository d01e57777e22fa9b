"""`pinrank features`: load groups into a feature store, inspect the store, and fold a stream of actions."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from server.cli.console import console, fail

if TYPE_CHECKING:
    from feature_client.stores.store import Store
    from model_store.bundle.manifest import Manifest

features = typer.Typer(
    no_args_is_help=True, help="Load, inspect and update the features of users and pins that rankers read."
)

FeatureStoreOption = Annotated[
    str,
    typer.Option(
        "--feature-store", help="The feature store: lmdb:///path, redis://host:port/db or redis+cluster://host:port.",
        envvar="PINRANK_FEATURE_STORE",
    ),
]  # fmt: skip
ModelStoreOption = Annotated[
    str | None,
    typer.Option(
        "--model-store", help="The model store: a folder, or s3://bucket/prefix.", envvar="PINRANK_MODEL_STORE"
    ),
]
ModelOption = Annotated[
    str | None, typer.Option(help="The name of a model that reads the group.", envvar="PINRANK_MODEL")
]
LabelOption = Annotated[str, typer.Option(help="The label of the model version.")]


@features.command()
def load(
    source: Annotated[
        Path,
        typer.Argument(help="A .parquet or .npz file with a column `id` and one column for each field of the group."),
    ],
    feature_store: FeatureStoreOption,
    group: Annotated[
        str,
        typer.Option(help="The name of the group in the model's manifest, or a JSON file that describes the group."),
    ],
    model_store: ModelStoreOption = None,
    model: ModelOption = None,
    label: LabelOption = "stable",
    *,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Replace rows of this version that have another description, such as another space."
        ),
    ] = False,
) -> None:
    """Write the rows of a group, verify a sample, and announce the group.

    Run the command again to resume an interrupted load. A new version of a group is stored beside the old one, which
    servers keep reading until they serve a model that reads the new one.

    Example: [bold]pinrank features load pins.parquet --group pin_core --model-store models --model ml1m
    --feature-store redis://127.0.0.1:6379/0[/]
    """
    from feature_client.bulk import load as bulk  # noqa: PLC0415
    from feature_client.bulk.source import Source  # noqa: PLC0415

    log_warnings(feature_store)

    async def run() -> bulk.Announcement:
        described = _group(group, model_store, model, label)
        opened = Source(source, described)
        if opened.ignored:
            typer.echo(
                f"ignored because {described.ref} has no such field: column {', '.join(opened.ignored)}", err=True
            )
        async with started_store(feature_store) as store:
            with Progress(
                SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}", markup=False), TimeRemainingColumn(),
                console=console(stderr=True),
            ) as progress:  # fmt: skip
                task = progress.add_task(described.ref, total=opened.rows, speed="")

                def show(what: str, done: int) -> None:
                    speed = f"{progress.tasks[0].speed or 0:,.0f} rows/s"
                    progress.update(task, description=what, completed=done, speed=speed)

                checking, writing = partial(show, f"checking {source.name}"), partial(show, described.ref)
                return await bulk.load(store, described, opened, writing, checking, replace=replace)

    announced = run_store_work(run())
    typer.echo(f"loaded and verified {announced.ref}: {announced.rows} rows, fingerprint {announced.fingerprint}")


@features.command()
def stat(
    feature_store: FeatureStoreOption,
    model_store: ModelStoreOption = None,
    model: ModelOption = None,
    label: LabelOption = "stable",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the groups and versions in a store: values, bytes, fingerprints, and the share that a model can read."""
    from dataclasses import asdict  # noqa: PLC0415

    from feature_client.bulk import load as bulk  # noqa: PLC0415

    log_warnings(feature_store)

    async def run() -> dict[str, bulk.GroupStat]:
        async with started_store(feature_store, read_only=True) as store:
            with console(stderr=True).status("reading keys") as status:
                return await bulk.stat(store, lambda seen: status.update(f"reading keys: {seen:,}"))

    known = _fingerprints(_manifest(model_store, model, label)) if model else {}
    found = run_store_work(run())
    if json_output:
        typer.echo(json.dumps({ref: asdict(own) for ref, own in found.items()}))
        return
    table = Table("group", "values", "bytes (estimated)", "fingerprints (sampled)", "loaded", "the model reads")
    for ref, own in sorted(found.items()):
        mean = own.sampled_bytes / own.sampled if own.sampled else 0.0
        most = sorted(own.fingerprints.items(), key=lambda item: -item[1])[:3]
        prints = ", ".join(f"{name}: {count / own.sampled:.1%}" for name, count in most)
        loaded = f"{own.announcement.rows:,} rows, verified" if own.announcement else ""
        share = own.fingerprints.get(known[ref], 0) / own.sampled if ref in known and own.sampled else None
        reads = "" if share is None else f"{share:.1%}"
        table.add_row(ref, f"{own.values:,}", f"{own.values * mean:,.0f}", prints, loaded, reads)
    for ref in sorted(set(known) - set(found)):
        table.add_row(ref, "0", "0", "", "", Text("no values", "bold red"))
    console().print(table)


@features.command()
def follow(
    feature_store: FeatureStoreOption,
    model_store: ModelStoreOption = None,
    model: ModelOption = None,
    label: LabelOption = "stable",
    stream: Annotated[str, typer.Option(help="The key of the Redis stream.")] = "pinrank:actions",
    stream_url: Annotated[
        str | None, typer.Option(help="The Redis server or cluster that holds the stream (default: the feature store).")
    ] = None,
    consumer_group: Annotated[
        str, typer.Option(help="The consumer group. Its members share the entries of the stream.")
    ] = "pinrank",
    name: Annotated[str, typer.Option(help="The name of this member. Keep it across restarts.")] = "1",
    retention_days: Annotated[
        float,
        typer.Option(
            min=0,
            max=36_500,
            help="How long a user's sequence is kept after its last action, and the greatest age of an action: as the "
            "servers' setting record_retention_days. 0 is for ever.",
        ),
    ] = 90.0,
) -> None:
    """Fold actions from a Redis stream into the users' sequences until SIGTERM or Ctrl-C.

    Each entry has the fields of pinrank.v1.Action: event_id, user_id, pin_id, action, surface, time_ms. Entries that
    are not valid actions are moved to the stream STREAM:refused, with the reason.
    """
    from feature_client.action_times import DAY_S  # noqa: PLC0415
    from feature_client.activity.stream import FollowerCounts, StreamFollower  # noqa: PLC0415
    from feature_client.redaction import redacted, secrets_of  # noqa: PLC0415
    from server.telemetry.logs import configure_logs  # noqa: PLC0415

    sequence = _manifest(model_store, model, label).sequence
    if sequence is None:
        fail(f"model {model} reads no action sequence, so it needs no follower; name a model that reads one (--model)")
    url = stream_url or feature_store
    if not url.startswith("redis"):
        fail(
            f"the stream must be in Redis: set --stream-url redis://host:port/db (the feature store is {redacted(url)})"
        )
    configure_logs("info", "auto", secrets_of(url) | secrets_of(feature_store))

    async def run() -> FollowerCounts:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with started_store(feature_store, create=False) as store:
            follower = StreamFollower(
                url, stream, consumer_group, name, store, sequence, lasts_s=retention_days * DAY_S or None
            )
            await follower.follow(stop)
            return follower.counts

    counts = run_store_work(run())
    told = f"{counts.added} added, {counts.repeated} repeated, {counts.too_old} too old, {counts.refused} refused"
    if counts.lost:
        told += f", {counts.lost} deleted from the stream before they were folded"
    if counts.future_dropped:
        told += f"; dropped {counts.future_dropped} stored actions that were in the future"
    typer.echo(told)


def run_store_work(work: Coroutine[Any, Any, Any]) -> Any:
    import uvloop  # noqa: PLC0415

    from feature_client.bulk.load import VerificationError  # noqa: PLC0415
    from feature_client.bulk.source import SourceError  # noqa: PLC0415
    from feature_client.bulk.write import ForeignValuesError  # noqa: PLC0415
    from feature_client.stores.store import StoreError  # noqa: PLC0415

    try:
        return uvloop.run(work)
    except (StoreError, SourceError, VerificationError, ForeignValuesError) as error:
        fail(str(error))


def log_warnings(url: str) -> None:
    """Send the warnings of a store to standard error, without the password of the URL."""
    from feature_client.redaction import secrets_of  # noqa: PLC0415
    from server.telemetry.logs import configure_logs  # noqa: PLC0415

    configure_logs("warning", "auto", secrets_of(url))


@asynccontextmanager
async def started_store(url: str, *, read_only: bool = False, create: bool = True) -> AsyncIterator[Store]:
    """Open a store that outlives the command, and close it afterwards."""
    from feature_client.stores.open_store import open_store  # noqa: PLC0415

    store = open_store(url, read_only=read_only, create=create, lasting=True)
    await store.start()
    try:
        yield store
    finally:
        await store.close()


def _manifest(model_store: str | None, model: str | None, label: str) -> Manifest:
    from model_store.bundle.files import BundleError  # noqa: PLC0415
    from model_store.registry.objects import ModelStoreError  # noqa: PLC0415
    from model_store.registry.store import open_model_store  # noqa: PLC0415

    if model_store is None or model is None:
        fail("name the model that reads the group: --model-store FOLDER --model NAME")
    store = open_model_store(model_store)
    try:
        return store.read(model, store.resolve(model, label)).manifest
    except (ModelStoreError, BundleError) as error:
        fail(str(error))


def _group(name: str, model_store: str | None, model: str | None, label: str) -> Any:
    """Return the group that a JSON file describes, or the group with this name in the model's manifest."""
    from pydantic import ValidationError  # noqa: PLC0415

    from feature_client.groups import FeatureGroup  # noqa: PLC0415

    if name.endswith(".json"):
        try:
            return FeatureGroup.model_validate_json(Path(name).read_bytes())
        except (OSError, ValidationError) as error:
            fail(f"{name} does not describe a feature group: {error}")
    groups = {group.name: group for group in _manifest(model_store, model, label).groups}
    if name not in groups:
        fail(f"model {model} reads no group {name!r}; it reads {', '.join(groups)}")
    return groups[name]


def _fingerprints(manifest: Manifest) -> dict[str, str]:
    described = [*manifest.groups, *([manifest.sequence] if manifest.sequence else [])]
    return {group.ref: group.fingerprint.hex() for group in described}
