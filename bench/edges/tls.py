"""Measure what TLS adds to the server's processor time for a Rank call.

Three servers run on the same machine, model and features: in plain text, with TLS, and with TLS and client
certificates. Each round offers the same requests to each of them in turn, over one connection, while the others have
nothing to do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import client
from bench.harness import Claim, Conclusion, Raw, markdown_table
from bench.processes import ServerProcess, cpu_seconds, server_process
from bench.test_bed import CONFIG, SEED, TestBed, check_all_ok, median, scene, without_surfaces
from pinrank.tls import ClientTls
from tests.certificates import Authority

PLAIN, TLS, MUTUAL = "plain text", "TLS", "TLS with client certificates"


@dataclass(frozen=True, slots=True)
class TlsPlan:
    rounds: int = 9
    rate_per_s: float = 100.0
    warmup_s: float = 1.0
    offered_s: float = 10.0


QUICK = TlsPlan(rounds=1, rate_per_s=20.0, warmup_s=0.1, offered_s=0.5)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Measure all three servers in alternating rounds. Raises BenchmarkError if one does not start or answer."""
    plan = QUICK if quick else TlsPlan()
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        stage = stack.enter_context(scene(config))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pinrank-tls-")))
        authority = Authority(folder / "authority")
        own = authority.client()
        callers: dict[str, tuple[ServerProcess, ClientTls | None]] = {PLAIN: (stage.server, None)}
        for number, (name, clients, tls) in enumerate((
            (TLS, "off", ClientTls(str(authority.file))),
            (MUTUAL, "require", ClientTls(str(authority.file), own.certificate, own.key)),
        )):  # fmt: skip
            settings = folder / f"{number}.toml"
            settings.write_text(_settings(stage, config, authority, clients))
            server = stack.enter_context(
                server_process(settings, stage.subject.feature_store, folder / f"{number}.log", tls=tls)
            )
            callers[name] = server, tls
        for number in range(plan.rounds):
            # Each server is the first one as often as the others.
            names = list(callers)[number % 3 :] + list(callers)[: number % 3]
            rounds.append({name: _offered(plan, number, stage, *callers[name]) for name in names})
            yield {
                "rate_per_s": plan.rate_per_s, "cores_kept_awake": stage.awake, "rounds": rounds,
            }  # fmt: skip


def _settings(stage: TestBed, config: Path, authority: Authority, clients: str) -> str:
    """Return the settings of `scene` with a certificate."""
    pair = authority.server()
    return without_surfaces(config) + (
        f'\nmodel_store = "{stage.subject.model_store.absolute()}"\n'
        f'[tls]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"\n'
        f'client_ca = "{authority.file}"\nclient_certificates = "{clients}"\n'
    )


def _offered(
    plan: TlsPlan, number: int, stage: TestBed, server: ServerProcess, tls: ClientTls | None
) -> dict[str, Any]:
    used_s = cpu_seconds(server.pid)
    summary = stage.client.submit(
        client.offer, server.address, stage.subject.requests, plan.rate_per_s, 0.0, plan.warmup_s + plan.offered_s,
        SEED + number, tls=tls,
    ).result()  # fmt: skip
    used_s = cpu_seconds(server.pid) - used_s
    check_all_ok("all servers", summary)
    return {
        "cpu_ms_per_call": used_s / sum(summary.statuses.values()) * 1e3,
        "latency_ms": summary.latency_ms and asdict(summary.latency_ms),
    }


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    cpu_ms = {name: [r[name]["cpu_ms_per_call"] for r in rounds] for name in (PLAIN, TLS, MUTUAL)}
    ratios = {
        name: median([own / plain for own, plain in zip(cpu_ms[name], cpu_ms[PLAIN], strict=True)])
        for name in (TLS, MUTUAL)
    }
    claims = tuple(
        Claim(f"Server's core-ms for a Rank call with {name}, over plain text", ratio, 1.05, "ratio", "at_most")
        for name, ratio in ratios.items()
    )
    summary: dict[str, float | None] = {f"{name}, core-ms a call": median(values) for name, values in cpu_ms.items()}
    rows = []
    for name, values in cpu_ms.items():
        latency = [r[name]["latency_ms"] for r in rounds]
        shown = [median([one[part] for one in latency if one]) for part in ("p50", "p99")]
        summary |= {f"{name}, P99 ms": shown[1]}
        rows.append((name, *(f"{value:.3g}" for value in (median(values), *shown))))
    table = markdown_table(
        f"Rank calls at {raw['rate_per_s']:g}/s", ("connection", "server's core-ms a call", "P50 ms", "P99 ms"), rows
    )
    return Conclusion(summary, claims, table)
