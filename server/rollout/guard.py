"""Judges whether a label's model is as good as the default label's, by errors, P99 latency and predictions. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from server.request.windows import WindowSummary


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits beyond which a label is rolled back.

    Attributes:
        requests_min: requests that both labels need before they are compared.
        error_rate_max: how far the error rate may exceed the default label's, as a fraction.
        p99_ratio_max: largest ratio of the label's P99 latency to the default label's.
        psi_max: largest population stability index (PSI) between any head's probabilities and the default label's.
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
        own: the label's recent requests.
        default: the default label's requests in the same period.
        moved: for each head that both labels have, the PSI between their probabilities.
        limits: the limits beyond which the label is rolled back.
    """
    least = min(own.requests, default.requests)
    if least < limits.requests_min:
        return TooEarly(f"{least} of {limits.requests_min} requests")
    rate, usual = own.errors / own.requests, default.errors / default.requests
    if rate > usual + limits.error_rate_max:
        return Breach(
            f"{rate:.2%} of its requests failed, against {usual:.2%} of the default label's; "
            f"the limit is {limits.error_rate_max:.2%} more"
        )
    if default.p99_s and own.p99_s > default.p99_s * limits.p99_ratio_max:
        return Breach(
            f"its P99 is {own.p99_s * 1e3:.1f} ms, against the default label's {default.p99_s * 1e3:.1f} ms; "
            f"the limit is {limits.p99_ratio_max:g} times as much"
        )
    head, psi = max(moved.items(), key=lambda item: item[1], default=("", 0.0))
    if psi > limits.psi_max:
        return Breach(
            f"its {head} probabilities differ from the default label's by {psi:.2f} (PSI); "
            f"the limit is {limits.psi_max:g}"
        )
    return Healthy(
        f"errors {rate:.2%} ({usual:.2%}), P99 {own.p99_s * 1e3:.1f} ms ({default.p99_s * 1e3:.1f}), "
        f"largest PSI {psi:.2f}"
    )
