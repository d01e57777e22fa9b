"""The settings of `pinrank load`, and bounds for all load generators."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.errors import LoadError
from loadtest.steps import Offer, rates_of
from loadtest.workload import Workload, parse_candidates, read_ids
from pinrank.channels import AddressError, parse_address

REQUESTS_MAX = 1_000_000
RATE_MAX = 50_000
DURATION_S_MAX = 3_600
CALLERS_MAX = 1_024
DEADLINE_MS_MAX = 60_000


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """The settings of one load test, under their names in the JSON summary."""

    rate_per_s: float
    steps: str | None
    search: bool
    arrivals: Path | None
    speed: float
    callers: int
    duration_s: float
    warmup_s: float
    candidates: str
    users: str
    pins: str
    popularity: float
    user_popularity: float
    surface: str
    label: str
    top_k: int
    deadline_ms: float
    target_ms: float
    seed: int
    retry: bool

    def as_json(self) -> dict[str, Any]:
        """Return the settings by name; those that another setting replaces are None."""
        replaced = bool(self.callers or self.steps or self.arrivals)
        return asdict(self) | {
            "rate_per_s": None if replaced else self.rate_per_s,
            "arrivals": str(self.arrivals) if self.arrivals else None,
            "callers": self.callers or None,
        }

    def rates(self) -> list[float]:
        """Return the rate of each step, in requests per second. Raises LoadError if `steps` is malformed."""
        return rates_of(self.rate_per_s, self.steps)

    def offer(self) -> Offer:
        """Check every setting and prepare the requests.

        Raises:
            LoadError: a setting is out of bounds, contradicts another, or names a file that cannot be read.
        """
        self._check_one_load()
        for rate in self.rates():
            check_bounds(rate, self.duration_s, self.warmup_s, self.callers, self.deadline_ms)
        self._check_numbers()
        ids = read_ids(self.users, "user_ids"), read_ids(self.pins, "pin_ids")
        workload = Workload(
            *ids, parse_candidates(self.candidates), self.popularity, self.surface, self.seed, self.user_popularity,
            self.label, self.top_k,
        )  # fmt: skip
        return Offer(
            workload, self.duration_s, self.warmup_s, self.target_ms, self.seed, self.callers, self.arrivals,
            self.speed, search=self.search,
        )  # fmt: skip

    def _check_one_load(self) -> None:
        given = {
            "--steps": self.steps, "--search": self.search, "--arrivals": self.arrivals, "--closed-loop": self.callers
        }  # fmt: skip
        named = [name for name, value in given.items() if value]
        if len(named) > 1:
            raise LoadError(f"{' and '.join(named)} cannot be used together; choose one")

    def _check_numbers(self) -> None:
        check_target(self.target_ms)
        if not 0 < self.speed < math.inf:
            raise LoadError(f"--speed must be a finite number above 0, but is {self.speed:g}")


def check_address(address: str, *, allow_remote: bool) -> None:
    """Raise LoadError unless the address is on this machine, or any address is allowed."""
    try:
        here = parse_address(address).here
    except AddressError as error:
        raise LoadError(f"--address {error}") from error
    if not here and not allow_remote:
        raise LoadError(
            f"{address} is not on this machine. A load test can cause an outage for everyone who uses the server; "
            "add --allow-remote if you may load it"
        )


def check_bounds(rate: float, duration_s: float, warmup_s: float, callers: int, deadline_ms: float) -> None:
    """Raise LoadError that names the first setting out of bounds."""
    if not 0 < duration_s <= DURATION_S_MAX:
        raise LoadError(f"--duration must be above 0 and at most {DURATION_S_MAX:,} seconds, but is {duration_s:g}")
    if not 0 <= warmup_s <= DURATION_S_MAX:
        raise LoadError(f"--warmup-s must be at least 0 and at most {DURATION_S_MAX:,} seconds, but is {warmup_s:g}")
    if not 0 <= callers <= CALLERS_MAX:
        raise LoadError(f"--closed-loop must be at least 0 and at most {CALLERS_MAX:,} callers, but is {callers}")
    if not 0 < rate <= RATE_MAX:
        raise LoadError(f"--rate must be above 0 and at most {RATE_MAX:,} requests per second, but is {rate:g}")
    if not callers and rate * (duration_s + warmup_s) > REQUESTS_MAX:
        raise LoadError(
            f"{rate:g} requests per second for {duration_s + warmup_s:g} seconds exceed the limit of "
            f"{REQUESTS_MAX:,} requests; lower --rate or --duration"
        )
    _check_milliseconds("--deadline-ms", deadline_ms)


def check_target(target_ms: float) -> None:
    """Raise LoadError unless the latency target is within bounds."""
    _check_milliseconds("--target-ms", target_ms)


def _check_milliseconds(option: str, value: float) -> None:
    if not 0 < value <= DEADLINE_MS_MAX:
        raise LoadError(f"{option} must be above 0 and at most {DEADLINE_MS_MAX:,} milliseconds, but is {value:g}")
