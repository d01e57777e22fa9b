"""`pinrank load`: offer load to a server on this machine and report what came back."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from loadtest.open_loop import Samples, Send
    from loadtest.report import Summary

REQUESTS_MAX = 1_000_000
RATE_MAX = 50_000
DURATION_S_MAX = 3_600
CALLERS_MAX = 1_024
#: How many different requests, and pins in all of them, are made beforehand; a longer run sends them again.
DISTINCT_MAX = 20_000
DISTINCT_PINS_MAX = 10_000_000
#: How long to look for a server.
CONNECT_S = 3.0


class LoadError(Exception):
    """The load cannot be offered; the message says what to change."""


def register(app: typer.Typer) -> None:
    """Add `load` to the `pinrank` command."""
    app.command()(load)


def load(
    address: Annotated[str, typer.Option(help="host:port of the server.")] = "127.0.0.1:50051",
    rate: Annotated[float, typer.Option(help="Requests per second, arriving like independent callers.")] = 100,
    closed_loop: Annotated[
        int, typer.Option(help="Instead of a rate: so many callers without pause, for the highest throughput.")
    ] = 0,
    duration: Annotated[float, typer.Option(help="Seconds that are measured.")] = 10,
    warmup_s: Annotated[float, typer.Option(help="Seconds of the same load before that.")] = 2,
    candidates: Annotated[str, typer.Option(help="Pins a request: 128, or COUNT:WEIGHT,...")] = "128",
    users: Annotated[str, typer.Option(help="User ids: FIRST-LAST, a JSON list, .npy or .npz.")] = "1-1000",
    pins: Annotated[str, typer.Option(help="Pin ids, most popular first; as for --users.")] = "1-5000",
    popularity: Annotated[float, typer.Option(help="Power-law exponent of the pins' popularity.")] = 0.8,
    surface: Annotated[str, typer.Option(help="Surface of every request.")] = "home",
    deadline_ms: Annotated[float, typer.Option(help="gRPC deadline of each call.")] = 25,
    target_ms: Annotated[float, typer.Option(help="An answer within this counts as goodput.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed offers the same load.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write settings and summary to this file.")] = None,
    allow_remote: Annotated[bool, typer.Option(help="Permit a server on another machine.")] = False,
) -> None:
    """Offer load to a running server and report rates, latency percentiles and what was degraded.

    Requests are sent when they are due, whatever the server does, and latency counts from then.

    Example: [bold]pinrank load --rate 100 --users users.json --pins pins.json[/]
    """
    from json import dumps  # noqa: PLC0415

    from loadtest.arrivals import poisson  # noqa: PLC0415
    from loadtest.open_loop import open_loop, run, saturate  # noqa: PLC0415
    from loadtest.report import summarise, table  # noqa: PLC0415
    from loadtest.workload import Workload, WorkloadError, parse_candidates, read_ids  # noqa: PLC0415

    settings: dict[str, Any] = {
        "rate_per_s": None if closed_loop else rate, "callers": closed_loop or None, "duration_s": duration,
        "warmup_s": warmup_s, "candidates": candidates, "users": users, "pins": pins, "popularity": popularity,
        "surface": surface, "deadline_ms": deadline_ms, "target_ms": target_ms, "seed": seed,
    }  # fmt: skip
    if json is not None and not json.parent.is_dir():
        _fail(f"--json {json}: there is no folder {json.parent}")
    try:
        check_address(address, allow_remote=allow_remote)
        check_bounds(rate, duration, warmup_s, closed_loop, deadline_ms)
        workload = Workload(
            read_ids(users, "user_ids"), read_ids(pins, "pin_ids"), parse_candidates(candidates), popularity, surface,
            seed,
        )  # fmt: skip
        due_s = poisson(rate, warmup_s + duration, seed)
        distinct = min(DISTINCT_MAX, DISTINCT_PINS_MAX // max(count for count, _ in workload.candidates))
        requests = list(workload.requests(max(1, distinct if closed_loop else min(distinct, len(due_s)))))

        async def offer(send: Send) -> Samples:
            if closed_loop:
                return await saturate(send, requests, closed_loop, warmup_s, duration)
            return (await open_loop(send, requests, due_s)).since(warmup_s)

        samples = run(_connected(address, requests[0], deadline_ms / 1e3, offer, warmup_s + duration))
    except (LoadError, WorkloadError) as error:
        _fail(str(error))
    summary: Summary = summarise(samples, duration, target_ms)
    Console().print(table(summary, f"load on {address}"))
    if json is not None:
        json.write_text(dumps({"settings": settings, "summary": summary.as_json()}, indent=2) + "\n")


def check_address(address: str, *, allow_remote: bool) -> None:
    """Raise LoadError unless the address is this machine's loopback, or anything is allowed."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise LoadError(f"--address {address!r}: write host:port, for example 127.0.0.1:50051")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not allow_remote:
        raise LoadError(
            f"{host} is not this machine: load on a server that others use is an outage. "
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
    address: str, first: bytes, deadline_s: float, offer: Callable[[Send], Awaitable[Samples]], total_s: float
) -> Samples:
    """Offer load over one channel, once a server there has answered the first request."""
    import asyncio  # noqa: PLC0415

    import grpc.aio  # noqa: PLC0415

    from loadtest.open_loop import sender  # noqa: PLC0415

    async with grpc.aio.insecure_channel(address) as channel:
        await _probe(channel, address, first)
        progress = asyncio.create_task(_show_progress(total_s))
        try:
            return await offer(sender(channel, deadline_s))
        finally:
            progress.cancel()


async def _probe(channel: Any, address: str, content: bytes) -> None:
    """Find out whether a server is there and takes such requests, before the clock starts."""
    import asyncio  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    from loadtest.open_loop import RANK  # noqa: PLC0415

    try:
        async with asyncio.timeout(CONNECT_S):
            await channel.channel_ready()
        await channel.unary_unary(RANK)(content, timeout=CONNECT_S)
    except TimeoutError as error:
        raise LoadError(f"no server answers at {address}; start one with `pinrank serve`, or set --address") from error
    except grpc.aio.AioRpcError as error:
        raise LoadError(f"the server refused the first request: {error.code().name}: {error.details()}") from error


async def _show_progress(total_s: float) -> None:
    """Draw a bar on a terminal a few times a second, from this event loop: a thread would delay the sends."""
    import asyncio  # noqa: PLC0415
    import time  # noqa: PLC0415

    from rich.progress import Progress  # noqa: PLC0415

    with Progress(auto_refresh=False, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("offering load", total=total_s)
        start_s = time.monotonic()
        while True:
            progress.update(task, completed=min(total_s, time.monotonic() - start_s), refresh=True)
            await asyncio.sleep(0.25)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False)
    raise typer.Exit(1)
