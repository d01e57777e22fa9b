"""What a run says: rates, percentiles, statuses and stages, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from loadtest.open_loop import OK, STAGES, Samples


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Exact, from all raw values; linear between neighbours, as `numpy.percentile`."""

    p50: float
    p90: float
    p99: float
    max: float

    @staticmethod
    def of(values: np.ndarray) -> Percentiles | None:
        """Return None for no values."""
        if not len(values):
            return None
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return Percentiles(p50, p90, p99, float(values.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers.

    Attributes:
        duration_s: the window in which requests were due.
        offered_per_s: requests due per second.
        achieved_per_s: OK answers per second, until the last one if that came after the window.
        goodput_per_s: OK, undegraded answers within `target_ms`, per second of the window.
        target_ms: the latency that goodput asks for.
        latency_ms: of OK answers, from due to answered; read it together with `statuses`, a refused or expired request
            has no place in it. None without any.
        late_ms: how late the generator sent; also part of `latency_ms`.
        statuses: how many requests ended with each gRPC status, or were dropped by the client.
        degraded: how many OK answers say that they are less than the full ranking.
        stage_ms: medians of the server's own timings over OK answers.
        generator_cores: processor cores that the load generator itself kept busy.
    """

    duration_s: float
    offered_per_s: float
    achieved_per_s: float
    goodput_per_s: float
    target_ms: float
    latency_ms: Percentiles | None
    late_ms: Percentiles | None
    statuses: dict[str, int]
    degraded: int
    stage_ms: dict[str, float]
    generator_cores: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: Samples, duration_s: float, target_ms: float) -> Summary:
    """Reduce samples to a summary.

    Args:
        samples: counted from the start of the window.
        duration_s: the window.
        target_ms: the latency that goodput asks for.
    """
    ok = np.array([status == OK for status in samples.statuses], bool)
    latency_ms = samples.latency_s[ok] * 1e3
    good = np.count_nonzero((latency_ms <= target_ms) & ~samples.degraded[ok])
    finished_s = max(duration_s, float(np.max((samples.due_s + samples.latency_s)[ok], initial=0.0)))
    medians = np.median(samples.stage_us[ok], axis=0) / 1e3 if ok.any() else np.empty(0)
    return Summary(
        duration_s=duration_s,
        offered_per_s=len(ok) / duration_s,
        achieved_per_s=int(ok.sum()) / finished_s,
        goodput_per_s=float(good / duration_s),
        target_ms=target_ms,
        latency_ms=Percentiles.of(latency_ms),
        late_ms=Percentiles.of(samples.late_s * 1e3),
        statuses=dict(Counter(samples.statuses).most_common()),
        degraded=int(np.count_nonzero(samples.degraded[ok])),
        stage_ms=dict(zip(STAGES, medians.tolist(), strict=False)),
        generator_cores=samples.generator_cores,
    )


def table(summary: Summary, title: str) -> Table:
    """Lay a summary out for a terminal."""
    shown = Table("what", "value", title=title, title_justify="left")
    shown.columns[1].justify = "right"
    total = sum(summary.statuses.values())
    shown.add_row("offered", f"{summary.offered_per_s:.1f} /s")
    shown.add_row("answered OK", f"{summary.achieved_per_s:.1f} /s")
    goodput = f"{summary.goodput_per_s:.1f} /s"
    shown.add_row(f"goodput: OK, undegraded, within {summary.target_ms:g} ms", goodput, style="bold", end_section=True)
    shown.add_row("latency of OK answers, from when they were due", _percentiles(summary.latency_ms))
    shown.add_row("the generator sent late by", _percentiles(summary.late_ms))
    shown.add_row("the generator's own load", f"{summary.generator_cores:.2f} cores", end_section=True)
    for status, count in summary.statuses.items():
        shown.add_row(status, f"{count} ({count / total:.2%})", style="" if status == OK else "red")
    shown.add_row("OK but degraded", str(summary.degraded), style="red" if summary.degraded else "", end_section=True)
    for stage, milliseconds in summary.stage_ms.items():
        shown.add_row(f"server, median {stage}", f"{milliseconds:.2f} ms")
    return shown


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return "none"
    return f"P50 {found.p50:.2f}  P90 {found.p90:.2f}  P99 {found.p99:.2f}  max {found.max:.2f} ms"
