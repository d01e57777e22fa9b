"""Compares what servers need of the processor for a call while the same client saturates all of them at the same time.

A shared machine's speed changes by a third within minutes, and with it the processor time of a call. Servers that take
turns differ by several percent for that alone; side by side, they feel the same changes. What remains is which of them
was started first (1 to 3%), so each order is measured as often as the others; and what a server learned of its engine
in its first seconds, by which it joins more or fewer calls in a run (up to 10%), so they are started several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bench.attacks.clients import Load, Saturation, outcome, results_of, saturate
from bench.attacks.place import Place
from bench.harness import BenchmarkError
from bench.test_bed import known_ratio
from loadtest.open_loop import OK, Samples
from pinrank.tls import ClientTls

_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Variant:
    """How one of the servers is set, and called.

    Attributes:
        settings: of the server, beside those that all have.
        tables: further settings as TOML tables.
        tokens: of the callers that call it in turn; none for calls without one.
        tls: how clients connect; None in plain text.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    tables: str = ""
    tokens: tuple[str, ...] = ()
    tls: ClientTls | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to compare.

    Attributes:
        starts: how often the servers are started in each order.
        orders_max: so many of the orders in which they can be started, at most.
        rounds: after each start.
        in_flight: calls that each server has at any time.
        warmup_s: of a round.
        step_s: of a round, after that.
    """

    starts: int = 5
    orders_max: int = 100
    rounds: int = 2
    in_flight: int = 8
    warmup_s: float = 1.0
    step_s: float = 4.0


QUICK = Plan(starts=1, orders_max=1, rounds=1, warmup_s=0.2, step_s=0.5)


def compare(ground: Place, variants: Mapping[str, Variant], plan: Plan, candidates: int) -> Iterator[list[Any]]:
    """Measure servers side by side; after each round, yields all rounds so far.

    Raises:
        BenchmarkError: a server does not start, or does not answer all calls completely.
    """
    rounds: list[Any] = []
    names = list(variants)
    orders = min(len(names), plan.orders_max)
    for start in range(orders * plan.starts):
        first = start % orders
        order = names[first:] + names[:first]
        with ExitStack() as stack:
            some = []
            for name in order:
                how = variants[name]
                server = stack.enter_context(ground.server(f"{start}-{name}", how.settings, how.tables, tls=how.tls))
                load = Load(server.address, ground.requests(candidates), _DEADLINE_S, np.empty(0), tls=how.tls)
                some.append(Saturation(load, server.pid, plan.in_flight, how.tokens))
            for _ in range(plan.rounds):
                (found,) = results_of(partial(saturate, tuple(some), plan.warmup_s, plan.step_s))
                rounds.append({
                    "order": order,
                    "servers": {name: _calls(name, *one) for name, one in zip(order, found, strict=True)},
                })  # fmt: skip
                yield rounds


def _calls(name: str, samples: Samples, cpu_s: float) -> dict[str, Any]:
    found = outcome(samples, _DEADLINE_S)
    if set(found["statuses"]) != {OK} or found["degraded"]:
        raise BenchmarkError(f"{name}: {found['statuses']}, {found['degraded']} degraded; expected full answers only")
    return {**found, "cpu_s": cpu_s}


def core_ms(rounds: Sequence[Any], name: str) -> list[float | None]:
    """Return the processor time of a call in each round, in milliseconds of one core; None without a call."""
    servers = [one["servers"][name] for one in rounds]
    return [one["cpu_s"] / one["good"] * 1e3 if one["good"] else None for one in servers]


def over(rounds: Sequence[Any], name: str, base: str) -> float | None:
    """Return the processor time of a call over that of the same call to `base`; None if an order has no such round.

    It is the median of the rounds of each order of starts, and the (geometric) mean of the orders.
    """
    ratios = []
    for order in sorted({tuple(one["order"]) for one in rounds}):
        some = [one for one in rounds if tuple(one["order"]) == order]
        ratio = known_ratio(core_ms(some, name), core_ms(some, base))
        if ratio is None:
            return None
        ratios.append(ratio)
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None
