"""`pinrank rank`: call a server from the command line and print its answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import grpc
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pinrank.answers import STAGES
from pinrank.channels import AddressError, open_channel, parse_address
from pinrank.tls import ClientTls
from pinrank.tokens import TokenFileError, authorization
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc


class RankCallError(Exception):
    """A call failed. The message says how to fix it where the fix is known."""


def call_rank(
    address: str,
    request: ranking_pb2.RankRequest,
    timeout_s: float,
    tls: ClientTls | None = None,
    token_file: Path | None = None,
) -> ranking_pb2.RankResponse:
    """Make one Rank call, and retry it when the server is unavailable. Raises RankCallError."""
    try:
        there, metadata = parse_address(address), authorization(token_file)
    except (AddressError, TokenFileError) as error:
        raise RankCallError(str(error)) from error
    with open_channel(address, retry=True, tls=tls) as channel:
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        try:
            response: ranking_pb2.RankResponse = stub.Rank(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code == grpc.StatusCode.UNAVAILABLE:
                details = there.unanswered(details, tls)
            raise RankCallError(f"{code.name}: {details}") from error
    return response


def show(response: ranking_pb2.RankResponse, console: Console, titles: Mapping[int, str] | None = None) -> None:
    """Print an explained answer: pins with head probabilities and party utilities, stage timings, degradations."""
    why = response.explanation
    heads, parties = len(why.heads), len(why.parties)
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    columns = [(head, "cyan") for head in why.heads]
    columns += [
        (f"{party}\nx {weight:g}", "magenta") for party, weight in zip(why.parties, why.party_weights, strict=True)
    ]
    columns.append(("utility", "bold"))
    widths = [max(5, *map(len, header.split("\n"))) for header, _ in columns]
    table.add_column("#", justify="right", min_width=2)
    # On a narrow terminal titles are cut to make room for the numbers; ids are not.
    room = console.width - 6 - sum(widths) - len(widths)
    id_width = max((len(str(pin)) for pin in response.pin_ids), default=3)
    pin_width = max(12, room) if titles else id_width
    table.add_column("pin", no_wrap=True, max_width=pin_width, min_width=None if titles else pin_width)
    for (header, style), width in zip(columns, widths, strict=True):
        table.add_column(header, justify="right", style=style, min_width=width)
    for i, (pin, utility) in enumerate(zip(response.pin_ids, response.utilities, strict=True)):
        probabilities = why.head_probabilities[i * heads : (i + 1) * heads]
        worth = why.party_utilities[i * parties : (i + 1) * parties]
        name = titles.get(pin, str(pin)) if titles else str(pin)
        cells = [f"{p:.3f}" for p in probabilities] + [f"{u:.3f}" for u in worth]
        table.add_row(str(i + 1), name, *cells, f"{utility:.3f}")
    legend = (("probability of each action", "cyan"), ", ", ("worth to each party, and its weight", "magenta"))
    console.print(Text.assemble(*legend))
    # A terminal too narrow for the ids gets long lines, not missing columns.
    console.print(table, width=max(console.width, console.width - room + pin_width), crop=False, soft_wrap=True)
    timings = response.timings
    times = "  ".join(f"{stage} {getattr(timings, f'{stage}_us') / 1e3:.2f}" for stage in STAGES)
    console.print(Text.assemble(f"milliseconds: {times}  ", (f"total {timings.total_us / 1e3:.2f}", "bold")))
    versions = response.versions
    console.print(
        f"model {versions.model}@{versions.model_version} ({versions.model_digest[:12]}), "
        f"utility {versions.utility[:12]}, features {', '.join(versions.feature_groups)}"
        + (f", products of {versions.products}" if versions.products else "")
    )
    degraded = [f"{field.name}={value}" for field, value in response.degradation.ListFields()]
    console.print(f"degraded: {', '.join(degraded) or 'nothing'}")
