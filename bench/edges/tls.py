"""Measure what TLS adds to the server's processor time for a Rank call.

Three servers run on the same machine, model and features: in plain text, with TLS, and with TLS and client
certificates. One client saturates all three at the same time, with the same requests, each over one connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.attacks.place import place
from bench.edges.side_by_side import QUICK, Plan, Variant, compare, core_ms, over
from bench.harness import Claim, Conclusion, Raw, markdown_table
from bench.test_bed import CONFIG, known_median
from pinrank.tls import ClientTls
from tests.certificates import Authority

PLAIN, TLS, MUTUAL = "plain text", "TLS", "TLS with client certificates"
_CANDIDATES = 128


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start, or does not answer a call completely."""
    with place(config) as ground:
        authority = Authority(ground.folder / "authority")
        own = authority.client()
        checked = str(authority.file)
        variants = {
            PLAIN: Variant(),
            TLS: Variant(tables=_tables(authority, "off"), tls=ClientTls(checked)),
            MUTUAL: Variant(tables=_tables(authority, "require"), tls=ClientTls(checked, own.certificate, own.key)),
        }
        for rounds in compare(ground, variants, QUICK if quick else Plan(), _CANDIDATES):
            yield {"rounds": rounds}


def _tables(authority: Authority, clients: str) -> str:
    pair = authority.server()
    return (
        f'[tls]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"\n'
        f'client_ca = "{authority.file}"\nclient_certificates = "{clients}"\n'
    )


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    ratios = {name: over(rounds, name, PLAIN) for name in (TLS, MUTUAL)}
    claims = tuple(
        Claim(
            f"Server's core-ms for a Rank call with {name}, over plain text",
            ratio, 1.05, "ratio", "at_most", "a round answered nothing",
        )
        for name, ratio in ratios.items()
    )  # fmt: skip
    used_ms = {name: known_median(core_ms(rounds, name)) for name in (PLAIN, TLS, MUTUAL)}
    table = markdown_table(
        f"{_CANDIDATES} candidates a call, {len(rounds)} rounds",
        ("connection", "server's core-ms a call", "over plain text"),
        [
            (name, *("" if one is None else f"{one:.3g}" for one in (used_ms[name], ratios.get(name))))
            for name in used_ms
        ],
    )
    return Conclusion({f"{name}, core-ms a call": value for name, value in used_ms.items()}, claims, table)
