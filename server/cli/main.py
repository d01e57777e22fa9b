"""The `pinrank` command. Each command imports its dependencies when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated

import typer

from pinrank.tls import ClientTls, with_tls_options
from server.cli import model_calls, model_diff, model_retune, plans  # noqa: F401 - importing them adds their commands to `model`
from server.cli.console import console, fail
from server.cli.features import features
from server.cli.models import models
from server.environment import TOKEN_FILE

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help=(
        "Rank pins for a user within about 10 ms: train models, publish versions, load features, serve Rank calls.\n\n"
        "Typical order: train a model, publish it (model publish), load its features (features load), serve it, "
        "and call the server (rank). `make demo` does all of it on public data."
    ),
)
app.add_typer(models, name="model")
app.add_typer(features, name="features")


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"pinrank {version('pinrank')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="TOML file of settings. PINRANK_* variables override it; options override both."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on: an IP address, a host name or unix:/path (default: 127.0.0.1)."),
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 0 picks a free one (default: 50051).")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port for /metrics and probes (default: 9095).")] = None,
    model_store: Annotated[str | None, typer.Option(help="Model store: a folder, or s3://bucket/prefix.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model to serve.")] = None,
    feature_store: Annotated[
        str | None, typer.Option(help="Feature store: lmdb:///path, redis://host:port/db or memory://.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Number of server processes on the gRPC port; each gets its own cores (default: 1)."),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure", help="Listen without TLS on other addresses than loopback: in a trusted network only."
        ),
    ] = None,
) -> None:
    """Serve Rank calls. SIGTERM or Ctrl-C makes the server finish its requests in flight and exit.

    Example: [bold]pinrank serve --model-store models --model ml1m --feature-store lmdb:///var/lib/pinrank/features[/]
    """
    from server.runtime.signals import end_on_signals  # noqa: PLC0415

    end_on_signals()
    _open_standard_streams()
    # At lower levels gRPC itself writes to standard error, including what callers sent. It reads this once, at import.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    import structlog  # noqa: PLC0415
    import uvloop  # noqa: PLC0415

    from feature_client.stores.store import StoreError  # noqa: PLC0415
    from model_store.bundle.files import BundleError  # noqa: PLC0415
    from model_store.model.utility import UtilityError  # noqa: PLC0415
    from model_store.registry.objects import ModelStoreError  # noqa: PLC0415
    from model_store.registry.signing import SigningError  # noqa: PLC0415
    from server import process  # noqa: PLC0415
    from server.app import StartError  # noqa: PLC0415
    from server.config import ConfigError  # noqa: PLC0415
    from server.config_sources import load_config, shadowing_links  # noqa: PLC0415
    from server.processes import serve_processes  # noqa: PLC0415
    from server.proving.prover import ProvingError  # noqa: PLC0415
    from server.proving.replay import NotReadyError  # noqa: PLC0415
    from server.telemetry.logs import configure_logs  # noqa: PLC0415

    options = {
        "host": host, "grpc_port": grpc_port, "http_port": http_port,
        "model_store": model_store, "model": model, "feature_store": feature_store, "processes": processes,
        "insecure": insecure,
    }  # fmt: skip
    try:
        settings = load_config(config, options)
        configure_logs(settings.log_level, settings.log_format, settings.secrets())
        if links := shadowing_links():
            reason = "Kubernetes set these variables for a Service of that name; pinrank ignores them"
            structlog.get_logger(__name__).warning("variables_set_aside", names=links, reason=reason)
        if settings.processes > 1:
            serve_processes(settings)
        else:
            uvloop.run(process.serve(settings))
    except (
        ConfigError, StoreError, ModelStoreError, BundleError, UtilityError, SigningError, ProvingError,
        NotReadyError, StartError,
    ) as error:  # fmt: skip
        fail(str(error))


@app.command()
@with_tls_options
def rank(
    user: Annotated[str, typer.Option(help="User id: a whole number from 0 to 2^64 - 1.")],
    pins: Annotated[str, typer.Option(help="Candidate pin ids, separated by commas.")],
    surface: Annotated[str, typer.Option(help="Surface that will show the ranking.")] = "home",
    query_pin: Annotated[str | None, typer.Option(help="Query pin id, for surfaces that need a query.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Label of the model version to use (default: the server's default label).")
    ] = None,
    model_version: Annotated[
        int | None, typer.Option(help="Number of the model version to use, instead of a label.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Number of best pins to return; 0 returns all.")] = 0,
    deadline_ms: Annotated[float, typer.Option(help="Deadline of the call, in milliseconds.")] = 1000,
    address: Annotated[str, typer.Option(help="Server address: host:port or unix:/path.")] = "127.0.0.1:50051",
    json: Annotated[bool, typer.Option("--json", help="Print the whole response as JSON.")] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a caller's token, if the server names callers.", envvar=TOKEN_FILE)
    ] = None,
    *,
    tls: ClientTls | None = None,
) -> None:
    """Ask a running server to rank pins, and explain the order: probabilities, utilities, timings, degradations.

    Example: [bold]pinrank rank --user 1 --pins 10,20,30[/]
    """
    from google.protobuf import json_format  # noqa: PLC0415

    from pinrank.v1 import ranking_pb2  # noqa: PLC0415
    from server.cli.rank_call import RankCallError, call_rank, show  # noqa: PLC0415

    if label is not None and model_version is not None:
        fail("--label and --model-version exclude each other; pass one of them")
    user_id = _id("--user", user)
    pin_ids = [_id("--pins", pin) for pin in pins.split(",") if pin.strip()]
    query_pin_id = None if query_pin is None else _id("--query-pin", query_pin)
    try:
        request = ranking_pb2.RankRequest(
            user_id=user_id,
            pin_ids=pin_ids,
            surface=surface,
            label=label,
            version=model_version,
            top_k=top_k,
            explain=True,
        )
    except ValueError as error:
        fail(f"--model-version must be a whole number from 0 to 2^64 - 1, and --top-k one from 0 to 2^32 - 1: {error}")
    if query_pin_id is not None:
        request.query.pin_id = query_pin_id
    try:
        response = call_rank(address, request, deadline_ms / 1e3, tls, token_file)
    except RankCallError as error:
        fail(str(error))
    if json:
        typer.echo(json_format.MessageToJson(response, preserving_proto_field_name=True))
    else:
        show(response, console())


def _id(option: str, text: str) -> int:
    """Parse a 64-bit id. The error says how to get the id of an identifier from the data."""
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 1 << 64):
        fail(
            f"{option} {text!r}: users and pins have numeric ids, whole numbers from 0 to 2^64 - 1; "
            f"`pinrank data ids {shlex.quote(text)}` prints the id of an identifier in your data"
        )
    return int(text)


def _open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream; else a socket or a store gets its number, and then its output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


for _point in entry_points(group="pinrank.commands"):
    _point.load()(app)
