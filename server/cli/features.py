"""`pinrank features`: what a feature store holds, loading whole groups, folding a stream of actions."""

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

features = typer.Typer(no_args_is_help=True, help="Load, inspect and keep current what rankers read of users and pins.")

FeatureStoreOption = Annotated[
    str,
    typer.Option(
        "--feature-store", help="lmdb:///path, redis://host:port/db or redis+cluster://host:port",
        envvar="PINRANK_FEATURE_STORE",
    ),
]  # fmt: skip
ModelStoreOption = Annotated[
    str | None,
    typer.Option(
        "--model-store", help="The model store: a folder, or s3://bucket/prefix.", envvar="PINRANK_MODEL_STORE"
    ),
]
ModelOption = Annotated[str | None, typer.Option(help="A model that reads the group.", envvar="PINRANK_MODEL")]
LabelOption = Annotated[str, typer.Option(help="Which of the model's versions.")]


@features.command()
def load(
    source: Annotated[Path, typer.Argument(help="A .parquet or .npz file: a column `id` and one for each field.")],
    feature_store: FeatureStoreOption,
    group: Annotated[
        str, typer.Option(help="The group's name in the model's manifest, or a JSON file that describes it.")
    ],
    model_store: ModelStoreOption = None,
    model: ModelOption = None,
    label: LabelOption = "stable",
) -> None:
    """Write a group's rows, verify a sample, and announce the group. Interrupted, it goes on where it was.

    A new version of a group stands beside the old one: servers go on reading theirs.

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
            typer.echo(f"ignored, as {described.ref} has no such field: column {', '.join(opened.ignored)}", err=True)
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
                return await bulk.load(store, described, opened, writing, checking)

    announced = run_store_work(run())
    typer.echo(f"loaded and verified {announced.ref}: {announced.rows} rows, fingerprint {announced.fingerprint}")


@features.command()
def stat(
    feature_store: FeatureStoreOption,
    model_store: ModelStoreOption = None,
    model: ModelOption = None,
    label: LabelOption = "stable",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a store's groups and versions: values, bytes, fingerprints, and whether a model could read them."""
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
        table.add_row(ref, "0", "0", "", "", Text("nothing there", "bold red"))
    console().print(table)


@features.command()
def follow(
    feature_store: FeatureStoreOption,
    model_store: ModelStoreOption = None,
    model: ModelOption = None,
    label: LabelOption = "stable",
    stream: Annotated[str, typer.Option(help="Key of the Redis stream.")] = "pinrank:actions",
    stream_url: Annotated[
        str | None, typer.Option(help="Redis that holds the stream (default: the feature store).")
    ] = None,
    consumer_group: Annotated[str, typer.Option(help="Its members share the stream's entries.")] = "pinrank",
    name: Annotated[str, typer.Option(help="This member; keep it over restarts.")] = "1",
) -> None:
    """Fold actions from a Redis stream into users' sequences until SIGTERM or Ctrl-C.

    Entries have the fields of pinrank.v1.Action: event_id, user_id, pin_id, action, surface, time_ms.
    What is no action goes to the stream's neighbour STREAM:refused, with the reason.
    """
    from feature_client.activity.stream import FollowerCounts, StreamFollower  # noqa: PLC0415
    from feature_client.redaction import redacted, secrets_of  # noqa: PLC0415
    from server.telemetry.logs import configure_logs  # noqa: PLC0415

    sequence = _manifest(model_store, model, label).sequence
    if sequence is None:
        fail(f"model {model} reads no action sequence")
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
        async with started_store(feature_store) as store:
            follower = StreamFollower(url, stream, consumer_group, name, store, sequence)
            await follower.follow(stop)
            return follower.counts

    counts = run_store_work(run())
    told = f"{counts.added} added, {counts.repeated} repeated, {counts.too_old} too old, {counts.refused} refused"
    if counts.lost:
        told += f", {counts.lost} deleted from the stream before they were folded"
    if counts.future_dropped:
        told += f"; {counts.future_dropped} stored actions in the future dropped"
    typer.echo(told)


def run_store_work(work: Coroutine[Any, Any, Any]) -> Any:
    import uvloop  # noqa: PLC0415

    from feature_client.bulk.load import VerificationError  # noqa: PLC0415
    from feature_client.bulk.source import SourceError  # noqa: PLC0415
    from feature_client.stores.store import StoreError  # noqa: PLC0415

    try:
        return uvloop.run(work)
    except (StoreError, SourceError, VerificationError) as error:
        fail(str(error))


def log_warnings(url: str) -> None:
    """Send what a store warns of to standard error, without the URL's password; standard output is the command's."""
    from feature_client.redaction import secrets_of  # noqa: PLC0415
    from server.telemetry.logs import configure_logs  # noqa: PLC0415

    configure_logs("warning", "auto", secrets_of(url))


@asynccontextmanager
async def started_store(url: str, *, read_only: bool = False) -> AsyncIterator[Store]:
    """Open a store and close it. Where it is only read, none is made and its volume need not be writable."""
    from feature_client.stores.open_store import open_store  # noqa: PLC0415

    store = open_store(url, read_only=read_only)
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
    """Return the group that a name in a manifest or a JSON file describes."""
    from pydantic import ValidationError  # noqa: PLC0415

    from feature_client.groups import FeatureGroup  # noqa: PLC0415

    if name.endswith(".json"):
        try:
            return FeatureGroup.model_validate_json(Path(name).read_bytes())
        except (OSError, ValidationError) as error:
            fail(f"{name} describes no feature group: {error}")
    groups = {group.name: group for group in _manifest(model_store, model, label).groups}
    if name not in groups:
        fail(f"model {model} reads no group {name!r}; it reads {', '.join(groups)}")
    return groups[name]


def _fingerprints(manifest: Manifest) -> dict[str, str]:
    described = [*manifest.groups, *([manifest.sequence] if manifest.sequence else [])]
    return {group.ref: group.fingerprint.hex() for group in described}
