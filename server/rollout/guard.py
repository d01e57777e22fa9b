"""Whether a label's answers are as good as the default label's. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from server.request.windows import WindowSummary


@dataclass(frozen=True, slots=True)
class Limits:
    """When a label is rolled back.

    Attributes:
        requests_min: of both labels, before anything is judged.
        error_rate_max: beyond the default label's.
        p99_ratio_max: against the default label's.
        psi_max: of any head's probabilities against the default label's.
    """

    requests_min: int
    error_rate_max: float
    p99_ratio_max: float
    psi_max: float


@dataclass(frozen=True, slots=True)
class Healthy:
    note: str


@dataclass(frozen=True, slots=True)
class TooEarly:
    note: str


@dataclass(frozen=True, slots=True)
class Breach:
    reason: str


Verdict = Healthy | TooEarly | Breach


def judge(own: WindowSummary, default: WindowSummary, moved: dict[str, float], limits: Limits) -> Verdict:
    """Compare a label with the default label.

    Args:
        own: of the label.
        default: of the default label, in the same time.
        moved: by head that both have, how far the label's probabilities are from the default's (PSI).
        limits: what is a breach.
    """
    least = min(own.requests, default.requests)
    if least < limits.requests_min:
        return TooEarly(f"{least} of {limits.requests_min} requests")
    rate, usual = own.errors / own.requests, default.errors / default.requests
    if rate > usual + limits.error_rate_max:
        return Breach(
            f"{rate:.2%} of its requests failed, {usual:.2%} of the default label's; "
            f"allowed are {limits.error_rate_max:.2%} more"
        )
    if default.p99_s and own.p99_s > default.p99_s * limits.p99_ratio_max:
        return Breach(
            f"its P99 is {own.p99_s * 1e3:.1f} ms, the default label's {default.p99_s * 1e3:.1f} ms; "
            f"allowed is {limits.p99_ratio_max:g} times as much"
        )
    head, psi = max(moved.items(), key=lambda item: item[1], default=("", 0.0))
    if psi > limits.psi_max:
        return Breach(
            f"its {head} probabilities moved by {psi:.2f} (PSI) against the default label's; "
            f"allowed are {limits.psi_max:g}"
        )
    return Healthy(
        f"errors {rate:.2%} ({usual:.2%}), P99 {own.p99_s * 1e3:.1f} ms ({default.p99_s * 1e3:.1f}), "
        f"largest PSI {psi:.2f}"
    )
