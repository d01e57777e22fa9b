"""The steps of a load test: given rates, the rates of a search, recorded arrivals, or callers without pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.arrivals import poisson, recorded
from loadtest.errors import LoadError
from loadtest.open_loop import Samples, Send, open_loop, saturate
from loadtest.report import Summary, summarise
from loadtest.search import HighestRate, RateSearch
from loadtest.workload import Workload

#: Maximum numbers of distinct requests, and of pins in all of them, made in advance; longer runs repeat the requests.
DISTINCT_MAX = 20_000
DISTINCT_PINS_MAX = 10_000_000
#: A rate is sustained if this share of its requests is goodput; refused, late and degraded requests count as failed.
GOOD_SHARE = 0.99
#: Pause between two steps, so that the server can finish the work of the last one.
_SETTLE_S = 0.5


@dataclass(slots=True)
class Offer:
    """A workload and the way to offer it; its requests are serialised once."""

    workload: Workload
    duration_s: float
    warmup_s: float
    target_ms: float
    seed: int = 0
    callers: int = 0
    arrivals: Path | None = None
    speed: float = 1.0
    search: bool = field(default=False, kw_only=True)
    requests: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        distinct = min(DISTINCT_MAX, DISTINCT_PINS_MAX // max(count for count, _ in self.workload.candidates))
        self.requests = list(self.workload.requests(max(1, distinct)))

    async def steps(self, send: Send, rates: Sequence[float]) -> AsyncIterator[tuple[Summary, Samples]]:
        """Run the steps in sequence.

        Args:
            send: sends one request.
            rates: rate of each step in requests per second; a search starts from the first.
        """
        if self.callers:
            samples = await saturate(send, self.requests, self.callers, self.warmup_s, self.duration_s)
            yield summarise(samples, self.duration_s, self.target_ms), samples
        elif self.arrivals is not None:
            due_s = recorded(self.arrivals, self.speed, self.warmup_s + self.duration_s)
            samples = (await open_loop(send, self.requests, due_s)).since(self.warmup_s)
            yield summarise(samples, self.duration_s, self.target_ms), samples
        elif self.search:
            search, number = RateSearch(rates[0]), 0
            while not isinstance(decision := search.next(), HighestRate):
                result = await self._step(send, decision.rate_per_s, number)
                search.tell(decision.rate_per_s, held=result[0].good_share >= GOOD_SHARE)
                number += 1
                yield result
        else:
            for number, rate_per_s in enumerate(rates):
                yield await self._step(send, rate_per_s, number)

    async def _step(self, send: Send, rate_per_s: float, number: int) -> tuple[Summary, Samples]:
        if number:
            await asyncio.sleep(_SETTLE_S)
        due_s = poisson(rate_per_s, self.warmup_s + self.duration_s, self.seed + number)
        samples = (await open_loop(send, self.requests, due_s)).since(self.warmup_s)
        return summarise(samples, self.duration_s, self.target_ms), samples


def found_by(results: Sequence[tuple[Summary, Samples]]) -> float:
    """Return the highest sustained rate; 0 if there is none."""
    return max((s.offered_per_s for s, _ in results if s.good_share >= GOOD_SHARE), default=0.0)


def rates_of(rate_per_s: float, steps: str | None) -> list[float]:
    """Parse `50,100,200`; without steps, return the single rate. Raises LoadError."""
    if steps is None:
        return [rate_per_s]
    try:
        return [float(part) for part in steps.split(",")]
    except ValueError as error:
        raise LoadError(f"--steps {steps!r}: separate rates by commas, e.g. 50,100,200") from error
