"""`pinrank model status | load | unload`: calls to the ModelService of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pinrank.tls import ClientTls, with_tls_options
from pinrank.tokens import TokenFileError, authorization
from server.cli.console import console, fail
from server.cli.models import VersionArgument, models
from server.environment import TOKEN_FILE

AddressOption = Annotated[str, typer.Option(help="Server address: host:port or unix:/path.")]
TokenOption = Annotated[
    Path,
    typer.Option(
        help="File with the server's admin token: the same file as its setting admin_token_file.", envvar=TOKEN_FILE
    ),
]


@models.command()
@with_tls_options
def status(
    token_file: TokenOption, address: AddressOption = "127.0.0.1:50051", *, tls: ClientTls | None = None
) -> None:
    """Show the versions that a running server holds, which version each label serves, and why others failed.

    Example: [bold]pinrank model status --token-file token[/]
    """
    from pinrank.v1 import models_pb2  # noqa: PLC0415

    found = _call(address, tls, token_file, "Status", models_pb2.StatusRequest())
    out = console()
    versions = Table("version", "phase", "for", "in flight", "memory", "checks or failure")
    for one in found.versions:
        checks = one.reason or "; ".join(one.checks)
        versions.add_row(
            str(one.version), one.phase, f"{one.phase_s:.0f} s", str(one.in_flight),
            f"{one.memory_bytes / 1e6:.0f} MB" if one.memory_bytes else "", checks,
        )  # fmt: skip
    out.print(versions)
    labels = Table("label", "serves", "wanted", "requests", "errors", "P99", "guard")
    for label in found.labels:
        labels.add_row(
            label.label, str(label.version or "none"), str(label.wanted_version or ""), str(label.requests),
            str(label.errors), f"{label.p99_ms:.1f} ms", label.guard,
        )  # fmt: skip
    out.print(labels)
    if found.store_failure:
        out.print(f"the server cannot read the model store: {found.store_failure}", style="bold red")
    if found.shadow.version:
        shadow = found.shadow
        heads = ", ".join(f"{h.head} {h.mean:.4f} / {h.shadow_mean:.4f} (PSI {h.psi:.2f})" for h in shadow.heads)
        out.print(
            f"shadow version {shadow.version}: {shadow.requests} requests compared, top-10 overlap "
            f"{shadow.top_10_overlap:.0%}; mean of served / shadow: {heads}",
            highlight=False,
        )
    for event in list(found.events)[-10:]:
        out.print(f"  {event.s_ago:5.0f} s ago  {event.text}", highlight=False, soft_wrap=True)


@models.command()
@with_tls_options
def load(
    number: VersionArgument,
    token_file: TokenOption,
    address: AddressOption = "127.0.0.1:50051",
    *,
    tls: ClientTls | None = None,
) -> None:
    """Load a version without a label into a running server. Requests can then ask for it by its number.

    Example: [bold]pinrank model load 42 --token-file token[/]
    """
    from pinrank.v1 import models_pb2  # noqa: PLC0415

    found = _call(address, tls, token_file, "Load", models_pb2.LoadRequest(version=number))
    if found.phase != "serving":
        fail(f"version {number} {found.phase}: {found.reason}")
    typer.echo(f"version {number} is serving; to use it, run: pinrank rank --model-version {number}")


@models.command()
@with_tls_options
def unload(
    number: VersionArgument,
    token_file: TokenOption,
    address: AddressOption = "127.0.0.1:50051",
    *,
    tls: ClientTls | None = None,
) -> None:
    """Release a version that `load` loaded into a running server.

    Example: [bold]pinrank model unload 42 --token-file token[/]
    """
    from pinrank.v1 import models_pb2  # noqa: PLC0415

    _call(address, tls, token_file, "Unload", models_pb2.UnloadRequest(version=number))
    typer.echo(f"version {number} is released")


def _call(address: str, tls: ClientTls | None, token_file: Path, name: str, request: Any) -> Any:
    import grpc  # noqa: PLC0415

    from pinrank.channels import AddressError, open_channel, parse_address  # noqa: PLC0415
    from pinrank.v1 import models_pb2_grpc  # noqa: PLC0415

    try:
        metadata, there = authorization(token_file), parse_address(address)
    except (TokenFileError, AddressError) as error:
        fail(str(error))
    with open_channel(address, tls=tls) as channel:
        try:
            method = getattr(models_pb2_grpc.ModelServiceStub(channel), name)
            return method(request, timeout=300, metadata=metadata)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            fail(f"{code.name}: {there.unanswered(details, tls) if code == grpc.StatusCode.UNAVAILABLE else details}")
