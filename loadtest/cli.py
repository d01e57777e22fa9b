"""`pinrank load`: offers load to a running server and reports the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from loadtest.errors import LoadError
from pinrank.tls import ClientTls, with_tls_options
from pinrank.tokens import Metadata, TokenFileError, authorization

if TYPE_CHECKING:
    from loadtest.open_loop import Samples
    from loadtest.report import Summary
    from loadtest.settings import LoadSettings
    from loadtest.steps import Offer

#: How long to wait for a server, in seconds.
CONNECT_S = 3.0


def register(app: typer.Typer) -> None:
    """Add `load` to the `pinrank` command."""
    app.command()(load)


@with_tls_options
def load(
    address: Annotated[str, typer.Option(help="Server address as host:port.")] = "127.0.0.1:50051",
    rate: Annotated[float, typer.Option(help="Requests per second, with Poisson arrivals.")] = 100,
    steps: Annotated[str | None, typer.Option(help="Several rates in sequence, e.g. 50,100,200.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the highest rate with 99% goodput, starting from --rate.")
    ] = False,
    arrivals: Annotated[
        Path | None, typer.Option(help="File of recorded arrivals instead of a rate: seconds, one per line, or .npy.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Speed-up factor for recorded arrivals.")] = 1.0,
    closed_loop: Annotated[
        int, typer.Option(help="Callers that send without pause, instead of a rate, for peak throughput.")
    ] = 0,
    duration: Annotated[float, typer.Option(help="Measured seconds per rate.")] = 10,
    warmup_s: Annotated[float, typer.Option(help="Seconds of the same load before each measurement.")] = 2,
    candidates: Annotated[str, typer.Option(help="Candidate pins per request: 128, or COUNT:WEIGHT,...")] = "128",
    users: Annotated[str, typer.Option(help="User ids, most active first: FIRST-LAST, a JSON list, .npy or .npz.")] = (
        "1-1000"
    ),
    pins: Annotated[str, typer.Option(help="Pin ids, most popular first, in the formats of --users.")] = "1-5000",
    popularity: Annotated[float, typer.Option(help="Power-law exponent of pin popularity.")] = 0.8,
    user_popularity: Annotated[float, typer.Option(help="Power-law exponent of user activity.")] = 0.5,
    surface: Annotated[str, typer.Option(help="Surface of every request.")] = "home",
    label: Annotated[str, typer.Option(help="Model label of every request (default: chosen by the server).")] = "",
    top_k: Annotated[int, typer.Option(help="Number of best pins to request; 0 requests all.")] = 0,
    deadline_ms: Annotated[float, typer.Option(help="gRPC deadline of each call, in milliseconds.")] = 25,
    target_ms: Annotated[float, typer.Option(help="Latency target of goodput, in milliseconds.")] = 10,
    seed: Annotated[int, typer.Option(help="Random seed; equal seeds offer equal load.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File to write settings and summaries to, as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file to write a report with charts to.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Retry calls that end with UNAVAILABLE, as frontends do.")
    ] = False,
    allow_remote: Annotated[bool, typer.Option(help="Allow a server on another machine.")] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with a caller's token, if the server names callers.", envvar="PINRANK_TOKEN_FILE"),
    ] = None,
    *,
    tls: ClientTls | None = None,
) -> None:
    """Offer load to a running server and report rates, latency percentiles and degradations.

    Requests are sent when they are due, whatever the server does, and latency is measured from that time. Goodput
    counts undegraded answers with status OK within --target-ms.

    Examples: [bold]pinrank load --rate 100 --users users.json --pins pins.json[/],
    [bold]pinrank load --steps 50,100,200 --report load.html[/], [bold]pinrank load --search --target-ms 25[/]
    """
    from loadtest.open_loop import run  # noqa: PLC0415
    from loadtest.settings import LoadSettings, check_address  # noqa: PLC0415
    from loadtest.steps import found_by  # noqa: PLC0415

    settings = LoadSettings(
        rate, steps, search, arrivals, speed, closed_loop, duration, warmup_s, candidates, users, pins, popularity,
        user_popularity, surface, label, top_k, deadline_ms, target_ms, seed, retry,
    )  # fmt: skip
    console = Console(markup=False, emoji=False)
    try:
        _check_outputs(json, report)
        check_address(address, allow_remote=allow_remote)
        metadata = authorization(token_file)
        results = run(_connected(address, settings.offer(), settings, console, tls, metadata))
    except (LoadError, TokenFileError) as error:
        _fail(str(error))
    found_per_s = found_by(results) if search else None
    if found_per_s is not None:
        console.print(f"highest rate with 99% goodput within {target_ms:g} ms: {found_per_s:.1f} requests/s")
    _write(f"Load on {address}", settings.as_json(), results, found_per_s, json, report)


def _write(
    title: str,
    settings: dict[str, Any],
    results: list[tuple[Summary, Samples]],
    found_per_s: float | None,
    json: Path | None,
    report: Path | None,
) -> None:
    from json import dumps  # noqa: PLC0415

    if json is not None:
        steps = [summary.as_json() for summary, _ in results]
        content = {"settings": settings, "summary": steps[-1], "steps": steps, "found_per_s": found_per_s}
        json.write_text(dumps(content, indent=2) + "\n")
    if report is not None:
        from loadtest.html import report_html  # noqa: PLC0415

        report.write_text(report_html(title, settings, results, found_per_s))
        Console(markup=False, emoji=False).print(f"wrote the report to {report}")


def _check_outputs(json: Path | None, report: Path | None) -> None:
    """Raise LoadError if a result could not be written at the end."""
    from importlib.util import find_spec  # noqa: PLC0415

    for option, path in (("--json", json), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise LoadError(f"{option} {path}: there is no folder {path.parent}; create it first")
    if report is not None and find_spec("matplotlib") is None:
        raise LoadError("--report needs matplotlib, which is not installed: pip install 'pinrank[load]'")


async def _connected(
    address: str,
    offer: Offer,
    settings: LoadSettings,
    console: Console,
    tls: ClientTls | None,
    metadata: Metadata,
) -> list[tuple[Summary, Samples]]:
    """Offer load over one channel after the server has answered a first request."""
    import asyncio  # noqa: PLC0415

    from loadtest.open_loop import sender  # noqa: PLC0415
    from loadtest.report import table  # noqa: PLC0415
    from pinrank.channels import open_aio_channel  # noqa: PLC0415

    async with open_aio_channel(address, retry=settings.retry, tls=tls) as channel:
        await _probe(channel, address, offer.requests[0], tls, metadata)
        results: list[tuple[Summary, Samples]] = []
        steps = offer.steps(sender(channel, settings.deadline_ms / 1e3, metadata), settings.rates())
        while True:
            progress = asyncio.create_task(_show_progress(offer.warmup_s + offer.duration_s))
            try:
                result = await anext(steps, None)
            finally:
                progress.cancel()
            if result is None:
                return results
            results.append(result)
            console.print(table(result[0], f"load on {address}"))


async def _probe(channel: Any, address: str, content: bytes, tls: ClientTls | None, metadata: Metadata) -> None:
    """Check before the clock starts that a server answers and accepts such requests."""
    import asyncio  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    from loadtest.open_loop import RANK  # noqa: PLC0415
    from pinrank.channels import parse_address  # noqa: PLC0415

    try:
        async with asyncio.timeout(CONNECT_S):
            await channel.channel_ready()
        await channel.unary_unary(RANK)(content, timeout=CONNECT_S, metadata=metadata)
    except TimeoutError as error:
        raise LoadError(parse_address(address).unanswered(tls=tls)) from error
    except grpc.aio.AioRpcError as error:
        raise LoadError(f"the server rejected the first request: {error.code().name}: {error.details()}") from error


async def _show_progress(total_s: float) -> None:
    """Draw a progress bar a few times per second from this event loop; a thread would delay the requests."""
    import asyncio  # noqa: PLC0415
    import time  # noqa: PLC0415

    from rich.progress import Progress  # noqa: PLC0415

    with Progress(
        auto_refresh=False, transient=True, console=Console(markup=False, emoji=False, stderr=True)
    ) as progress:
        task = progress.add_task("offering load", total=total_s)
        start_s = time.monotonic()
        while True:
            progress.update(task, completed=min(total_s, time.monotonic() - start_s), refresh=True)
            await asyncio.sleep(0.25)


def _fail(message: str) -> NoReturn:
    Console(markup=False, emoji=False, stderr=True).print(
        Text.assemble(("error: ", "bold red"), message), soft_wrap=True
    )
    raise typer.Exit(1)
