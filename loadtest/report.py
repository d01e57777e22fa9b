"""The summary of a run: rates, percentiles, statuses and stages, for a terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from rich.table import Table

from loadtest.open_loop import OK, STAGES, Samples

REFUSED = "RESOURCE_EXHAUSTED"
#: Ten minutes, longer than any call may take.
_HDR_US_MAX = 600_000_000


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Exact percentiles of all raw values, interpolated linearly as in `numpy.percentile`."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float

    @staticmethod
    def of(values: np.ndarray) -> Percentiles | None:
        """Return the percentiles; None if there are no values."""
        if not len(values):
            return None
        p50, p90, p99, p999 = np.percentile(values, (50, 90, 99, 99.9)).tolist()
        return Percentiles(p50, p90, p99, p999, float(values.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers.

    Attributes:
        duration_s: the window in which requests were due.
        offered_per_s: requests due per second.
        achieved_per_s: OK answers per second, until the last one if that came after the window.
        goodput_per_s: OK, undegraded answers within `target_ms`, per second of the window.
        good_share: share of goodput among the offered requests.
        target_ms: latency target of goodput.
        latency_ms: latency of OK answers from due to answered, None without any. Read it together with `statuses`: it
            does not include refused and expired requests.
        refused_ms: latency of RESOURCE_EXHAUSTED answers; None without any.
        late_ms: how late the generator sent requests; also part of `latency_ms`.
        statuses: number of requests by gRPC status, or dropped by the client.
        degraded: number of OK answers that report a degradation.
        degraded_by: number of OK answers by kind of degradation.
        models: models that answered, as "name@version".
        stage_ms: medians of the server's own timings over OK answers.
        stage_p99_ms: the same, P99.
        generator_cores: processor cores used by the load generator itself.
        latency_hdr: latency of OK answers in microseconds as an encoded HdrHistogram with three digits, for tools that
            merge or plot histograms.
    """

    duration_s: float
    offered_per_s: float
    achieved_per_s: float
    goodput_per_s: float
    good_share: float
    target_ms: float
    latency_ms: Percentiles | None
    refused_ms: Percentiles | None
    late_ms: Percentiles | None
    statuses: dict[str, int]
    degraded: int
    degraded_by: dict[str, int]
    models: list[str]
    stage_ms: dict[str, float]
    stage_p99_ms: dict[str, float]
    generator_cores: float
    latency_hdr: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: Samples, duration_s: float, target_ms: float) -> Summary:
    """Reduce samples to a summary.

    Args:
        samples: samples with times from the start of the window.
        duration_s: length of the window.
        target_ms: latency target of goodput.
    """
    ok = np.array([status == OK for status in samples.statuses], bool)
    latency_ms = samples.latency_s[ok] * 1e3
    good = np.count_nonzero((latency_ms <= target_ms) & ~samples.degraded[ok])
    finished_s = max(duration_s, float(np.max((samples.due_s + samples.latency_s)[ok], initial=0.0)))
    stages = np.percentile(samples.stage_us[ok], (50, 99), axis=0) / 1e3 if ok.any() else np.empty((2, 0))
    refused = np.array([status == REFUSED for status in samples.statuses], bool)
    return Summary(
        duration_s=duration_s,
        offered_per_s=len(ok) / duration_s,
        achieved_per_s=int(ok.sum()) / finished_s,
        goodput_per_s=float(good / duration_s),
        good_share=float(good / max(1, len(ok))),
        target_ms=target_ms,
        latency_ms=Percentiles.of(latency_ms),
        refused_ms=Percentiles.of(samples.latency_s[refused] * 1e3),
        late_ms=Percentiles.of(samples.late_s * 1e3),
        statuses=dict(Counter(samples.statuses).most_common()),
        degraded=int(np.count_nonzero(samples.degraded[ok])),
        degraded_by=dict(Counter(kind for kinds in samples.degradations for kind in kinds).most_common()),
        models=list(samples.models),
        stage_ms=dict(zip(STAGES, stages[0].tolist(), strict=False)),
        stage_p99_ms=dict(zip(STAGES, stages[1].tolist(), strict=False)),
        generator_cores=samples.generator_cores,
        latency_hdr=_encoded(latency_ms),
    )


def _encoded(latency_ms: np.ndarray) -> str:
    histogram = HdrHistogram(1, _HDR_US_MAX, 3)
    values, counts = np.unique(np.clip(np.rint(latency_ms * 1e3), 1, _HDR_US_MAX).astype(np.int64), return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)
    encoded: bytes = histogram.encode()
    return encoded.decode()


def table(summary: Summary, title: str) -> Table:
    """Format a summary for a terminal."""
    shown = Table("what", "value", title=title, title_justify="left")
    shown.columns[1].justify = "right"
    total = sum(summary.statuses.values())
    shown.add_row("offered", f"{summary.offered_per_s:.1f} /s")
    shown.add_row("answered OK", f"{summary.achieved_per_s:.1f} /s")
    goodput = f"{summary.goodput_per_s:.1f} /s"
    shown.add_row(f"goodput: OK, undegraded, within {summary.target_ms:g} ms", goodput, style="bold", end_section=True)
    shown.add_row("latency of OK answers, from their due time", _percentiles(summary.latency_ms))
    if summary.refused_ms is not None:
        shown.add_row("latency of refusals", _percentiles(summary.refused_ms))
    shown.add_row("delay of the load generator", _percentiles(summary.late_ms))
    shown.add_row("CPU use of the load generator", f"{summary.generator_cores:.2f} cores", end_section=True)
    for status, count in summary.statuses.items():
        shown.add_row(status, f"{count} ({count / total:.2%})", style="" if status == OK else "red")
    kinds = ", ".join(f"{kind} {count}" for kind, count in summary.degraded_by.items())
    shown.add_row(
        "OK but degraded", f"{summary.degraded} {kinds}".strip(), style="red" if summary.degraded else "",
        end_section=True,
    )  # fmt: skip
    for stage, milliseconds in summary.stage_ms.items():
        shown.add_row(f"server, median {stage}", f"{milliseconds:.2f} ms")
    return shown


def _percentiles(found: Percentiles | None) -> str:
    if found is None:
        return "none"
    return (
        f"P50 {found.p50:.2f}  P90 {found.p90:.2f}  P99 {found.p99:.2f}  P99.9 {found.p999:.2f}  max {found.max:.2f} ms"
    )
