"""`pinrank load`: offer load to a server on this machine and report what came back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from loadtest.errors import LoadError

if TYPE_CHECKING:
    from loadtest.open_loop import Samples
    from loadtest.report import Summary
    from loadtest.steps import Offer

REQUESTS_MAX = 1_000_000
RATE_MAX = 50_000
DURATION_S_MAX = 3_600
CALLERS_MAX = 1_024
#: How long to look for a server.
CONNECT_S = 3.0


def register(app: typer.Typer) -> None:
    """Add `load` to the `pinrank` command."""
    app.command()(load)


def load(
    address: Annotated[str, typer.Option(help="host:port of the server.")] = "127.0.0.1:50051",
    rate: Annotated[float, typer.Option(help="Requests per second, arriving like independent callers.")] = 100,
    steps: Annotated[str | None, typer.Option(help="Several rates, one after the other: 50,100,200.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the highest rate of which 99% are goodput, beginning with --rate.")
    ] = False,
    arrivals: Annotated[
        Path | None, typer.Option(help="Instead of a rate: recorded arrivals, seconds one a line or .npy.")
    ] = None,
    speed: Annotated[float, typer.Option(help="Play recorded arrivals so much faster.")] = 1.0,
    closed_loop: Annotated[
        int, typer.Option(help="Instead of a rate: so many callers without pause, for the highest throughput.")
    ] = 0,
    duration: Annotated[float, typer.Option(help="Seconds that are measured, for each rate.")] = 10,
    warmup_s: Annotated[float, typer.Option(help="Seconds of the same load before that.")] = 2,
    candidates: Annotated[str, typer.Option(help="Pins a request: 128, or COUNT:WEIGHT,...")] = "128",
    users: Annotated[str, typer.Option(help="User ids, most active first: FIRST-LAST, a JSON list, .npy or .npz.")] = (
        "1-1000"
    ),
    pins: Annotated[str, typer.Option(help="Pin ids, most popular first; as for --users.")] = "1-5000",
    popularity: Annotated[float, typer.Option(help="Power-law exponent of the pins' popularity.")] = 0.8,
    user_popularity: Annotated[float, typer.Option(help="Power-law exponent of the users' activity.")] = 0.5,
    surface: Annotated[str, typer.Option(help="Surface of every request.")] = "home",
    label: Annotated[str, typer.Option(help="Model label of every request (default: the server's).")] = "",
    top_k: Annotated[int, typer.Option(help="Ask for only the best; 0 asks for all.")] = 0,
    deadline_ms: Annotated[float, typer.Option(help="gRPC deadline of each call.")] = 25,
    target_ms: Annotated[float, typer.Option(help="An answer within this counts as goodput.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed offers the same load.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write settings and summaries to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report with plots: one HTML file.")] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Make calls that end with UNAVAILABLE again, as frontends do.")
    ] = False,
    allow_remote: Annotated[bool, typer.Option(help="Permit a server on another machine.")] = False,
) -> None:
    """Offer load to a running server and report rates, latency percentiles and what was degraded.

    Requests are sent when they are due, whatever the server does, and latency counts from then. Goodput is what was
    answered with OK, undegraded, within --target-ms.

    Examples: [bold]pinrank load --rate 100 --users users.json --pins pins.json[/],
    [bold]pinrank load --steps 50,100,200 --report load.html[/], [bold]pinrank load --search --target-ms 25[/]
    """
    from loadtest.arrivals import ArrivalsError  # noqa: PLC0415
    from loadtest.open_loop import run  # noqa: PLC0415
    from loadtest.steps import Offer, found_by, rates_of  # noqa: PLC0415
    from loadtest.workload import Workload, WorkloadError, parse_candidates, read_ids  # noqa: PLC0415

    settings: dict[str, Any] = {
        "rate_per_s": None if closed_loop or steps or arrivals else rate, "steps": steps, "search": search,
        "arrivals": str(arrivals) if arrivals else None, "speed": speed, "callers": closed_loop or None,
        "duration_s": duration, "warmup_s": warmup_s, "candidates": candidates, "users": users, "pins": pins,
        "popularity": popularity, "user_popularity": user_popularity, "surface": surface, "label": label,
        "top_k": top_k, "deadline_ms": deadline_ms, "target_ms": target_ms, "seed": seed, "retry": retry,
    }  # fmt: skip
    try:
        _check_outputs(json, report)
        check_address(address, allow_remote=allow_remote)
        rates = rates_of(rate, steps)
        _check_one_of(steps=steps, search=search, arrivals=arrivals, closed_loop=closed_loop)
        check_bounds(max(rates), duration, warmup_s, closed_loop, deadline_ms)
        check_bounds(min(rates), duration, warmup_s, closed_loop, deadline_ms)
        if not 0 < speed < float("inf"):
            raise LoadError(f"--speed {speed:g}: a number above 0")
        workload = Workload(
            read_ids(users, "user_ids"), read_ids(pins, "pin_ids"), parse_candidates(candidates), popularity, surface,
            seed, user_popularity, label, top_k,
        )  # fmt: skip
        offer = Offer(workload, duration, warmup_s, target_ms, seed, closed_loop, arrivals, speed, search=search)
        told = Console(markup=False, emoji=False)
        results = run(_connected(address, offer, rates, deadline_ms / 1e3, told, retry=retry))
    except (LoadError, WorkloadError, ArrivalsError) as error:
        _fail(str(error))
    found_per_s = found_by(results) if search else None
    if found_per_s is not None:
        told.print(f"highest rate of which 99% were answered in full within {target_ms:g} ms: {found_per_s:.1f} /s")
    _write(f"Load on {address}", settings, results, found_per_s, json, report)


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
        Console(markup=False, emoji=False).print(f"wrote {report}")


def _check_outputs(json: Path | None, report: Path | None) -> None:
    """Raise LoadError for what could not be written at the end."""
    from importlib.util import find_spec  # noqa: PLC0415

    for option, path in (("--json", json), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise LoadError(f"{option} {path}: there is no folder {path.parent}")
    if report is not None and find_spec("matplotlib") is None:
        raise LoadError("--report draws with matplotlib: pip install 'pinrank[load]'")


def _check_one_of(**given: object) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if len(named) > 1:
        raise LoadError(f"{' and '.join(named)} exclude each other; name one")


def check_address(address: str, *, allow_remote: bool) -> None:
    """Raise LoadError unless the address is this machine's loopback, or anything is allowed."""
    from pinrank.channels import AddressError, parse_address  # noqa: PLC0415

    try:
        here = parse_address(address).here
    except AddressError as error:
        raise LoadError(f"--address {error}") from error
    if not here and not allow_remote:
        raise LoadError(
            f"{address} is not this machine: load on a server that others use is an outage. "
            "Add --allow-remote if it is yours to load"
        )


def check_bounds(rate: float, duration_s: float, warmup_s: float, callers: int, deadline_ms: float) -> None:
    """Raise LoadError naming the first setting that is beyond what this generator should be asked for."""
    if not 0 < duration_s <= DURATION_S_MAX or not 0 <= warmup_s <= DURATION_S_MAX:
        raise LoadError(f"--duration {duration_s:g}, --warmup-s {warmup_s:g}: at most {DURATION_S_MAX} seconds each")
    if not 0 <= callers <= CALLERS_MAX:
        raise LoadError(f"--closed-loop {callers}: at most {CALLERS_MAX} callers")
    if not 0 < rate <= RATE_MAX:
        raise LoadError(f"--rate {rate:g}: above 0, at most {RATE_MAX:,} requests per second")
    if not callers and rate * (duration_s + warmup_s) > REQUESTS_MAX:
        raise LoadError(
            f"{rate:g} requests per second for {duration_s + warmup_s:g} seconds are more than {REQUESTS_MAX:,} "
            "requests; lower --rate or --duration"
        )
    if not 0 < deadline_ms <= 60_000:
        raise LoadError(f"--deadline-ms {deadline_ms:g}: above 0, at most 60,000 milliseconds")


async def _connected(
    address: str, offer: Offer, rates: Sequence[float], deadline_s: float, told: Console, *, retry: bool
) -> list[tuple[Summary, Samples]]:
    """Offer load over one channel, once a server there has answered the first request."""
    import asyncio  # noqa: PLC0415

    from loadtest.open_loop import sender  # noqa: PLC0415
    from loadtest.report import table  # noqa: PLC0415
    from pinrank.channels import open_aio_channel  # noqa: PLC0415

    async with open_aio_channel(address, retry=retry) as channel:
        await _probe(channel, address, offer.requests[0])
        results: list[tuple[Summary, Samples]] = []
        steps = offer.steps(sender(channel, deadline_s), rates)
        while True:
            progress = asyncio.create_task(_show_progress(offer.warmup_s + offer.duration_s))
            try:
                result = await anext(steps, None)
            finally:
                progress.cancel()
            if result is None:
                return results
            results.append(result)
            told.print(table(result[0], f"load on {address}"))


async def _probe(channel: Any, address: str, content: bytes) -> None:
    """Find out whether a server is there and takes such requests, before the clock starts."""
    import asyncio  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    from loadtest.open_loop import RANK  # noqa: PLC0415
    from pinrank.channels import parse_address  # noqa: PLC0415

    try:
        async with asyncio.timeout(CONNECT_S):
            await channel.channel_ready()
        await channel.unary_unary(RANK)(content, timeout=CONNECT_S)
    except TimeoutError as error:
        raise LoadError(parse_address(address).unanswered()) from error
    except grpc.aio.AioRpcError as error:
        raise LoadError(f"the server refused the first request: {error.code().name}: {error.details()}") from error


async def _show_progress(total_s: float) -> None:
    """Draw a bar on a terminal a few times a second, from this event loop: a thread would delay the sends."""
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
