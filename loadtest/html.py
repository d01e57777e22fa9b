"""A load test as one self-contained HTML file with embedded charts. Matplotlib comes with the extra `load`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from loadtest.open_loop import OK, STAGES, Samples
from loadtest.report import REFUSED, Summary

_STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "svg.fonttype": "path", "svg.hashsalt": "pinrank",
}  # fmt: skip
#: Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
#: Above this delay, the latencies are partly those of the load generator.
_LATE_P99_MS = 2.0
_SERVER_STAGES = STAGES[:-1]

_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .22rem .8rem .22rem 0; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; display: block; margin: .6rem 0; }
.wide { overflow-x: auto; } .note { opacity: .75; font-size: .88rem; }
.warning { border-left: 4px solid #D55E00; padding: .3rem .8rem; font-weight: 600; }
"""


def report_html(
    title: str, settings: Mapping[str, object], steps: Sequence[tuple[Summary, Samples]], found_per_s: float | None
) -> str:
    """Return the whole page.

    Args:
        title: title of the page.
        settings: settings of the load test, by name.
        steps: summary and samples of each step, in the order of the run.
        found_per_s: result of a search in requests per second; None without a search.
    """
    ordered = sorted(steps, key=lambda step: step[0].offered_per_s)
    summaries = [summary for summary, _ in ordered]
    best = max(ordered, key=lambda step: step[0].goodput_per_s)
    target_ms = summaries[0].target_ms
    with mpl.rc_context(_STYLE):
        parts = [
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(_headline(summaries, found_per_s))}</p>",
            *(f'<p class="warning">{escape(text)}</p>' for text in _warnings(summaries)),
            "<h2>Steps</h2>",
            _table(_STEP_HEADER, [_step_row(summary) for summary in summaries]),
            f'<p class="note">{_TERMS.format(target_ms=target_ms)}</p>',
            "<h2>Latency and goodput by offered rate</h2>",
            _picture(_throughput_chart(summaries), "latency and goodput by offered rate"),
            "<h2>Where the server's time goes</h2>",
            _picture(_stage_chart(summaries), "server stages by offered rate"),
            f"<h2>Step with the highest goodput: {best[0].offered_per_s:.0f} requests/s</h2>",
            _picture(_course_chart(*best), "latency over time, and its percentiles"),
            "<h2>Results by status</h2>",
            _table(*_endings(summaries)),
            "<h2>Settings</h2>",
            _table(("setting", "value"), [(str(name), str(value)) for name, value in settings.items()]),
        ]
    models = ", ".join(sorted({model for summary in summaries for model in summary.models})) or "none"
    parts.append(f'<p class="note">Models that answered: {escape(models)}.</p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{_CSS}</style></head>\n'
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _headline(summaries: Sequence[Summary], found_per_s: float | None) -> str:
    target_ms, best = summaries[0].target_ms, max(summaries, key=lambda summary: summary.goodput_per_s)
    if found_per_s is not None:
        return f"The highest rate with 99% goodput within {target_ms:g} ms is {found_per_s:.1f} requests/s."
    return (
        f"The highest goodput within {target_ms:g} ms is {best.goodput_per_s:.1f} requests/s, "
        f"at {best.offered_per_s:.1f} offered requests/s ({best.good_share:.1%})."
    )


def _warnings(summaries: Sequence[Summary]) -> list[str]:
    late = [s for s in summaries if s.late_ms is not None and s.late_ms.p99 > _LATE_P99_MS]
    if not late:
        return []
    worst = max(s.late_ms.p99 for s in late if s.late_ms is not None)
    text = f"The load generator was late in {len(late)} of {len(summaries)} steps (P99 up to {worst:.1f} ms): "
    return [text + "it lacked processor time, so the latencies below include its own delay."]


_TERMS = (
    "Goodput counts undegraded OK answers within {target_ms:g} ms of the time when the request was due. "
    "Latency is that of OK answers, measured from the same time."
)
_STEP_HEADER = (
    "offered /s", "OK /s", "goodput /s", "good", "P50 ms", "P90 ms", "P99 ms", "P99.9 ms", "max ms", "refused P99 ms",
    "sent late P99 ms", "generator cores",
)  # fmt: skip


def _step_row(s: Summary) -> tuple[str, ...]:
    latency = s.latency_ms
    shown: tuple[str, ...] = ("",) * 5
    if latency is not None:
        shown = tuple(f"{v:.2f}" for v in (latency.p50, latency.p90, latency.p99, latency.p999, latency.max))
    refused = "" if s.refused_ms is None else f"{s.refused_ms.p99:.2f}"
    late = "" if s.late_ms is None else f"{s.late_ms.p99:.2f}"
    rates = (f"{s.offered_per_s:.1f}", f"{s.achieved_per_s:.1f}", f"{s.goodput_per_s:.1f}", f"{s.good_share:.2%}")
    return (*rates, *shown, refused, late, f"{s.generator_cores:.2f}")


def _endings(summaries: Sequence[Summary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    statuses = sorted({status for s in summaries for status in s.statuses}, key=lambda status: (status != OK, status))
    kinds = sorted({kind for s in summaries for kind in s.degraded_by})
    header = ("offered /s", *statuses, *(f"degraded: {kind}" for kind in kinds))
    rows = [
        (
            f"{s.offered_per_s:.1f}",
            *(str(s.statuses.get(status, 0)) for status in statuses),
            *(str(s.degraded_by.get(kind, 0)) for kind in kinds),
        )
        for s in summaries
    ]
    return header, rows


def _throughput_chart(summaries: Sequence[Summary]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    answered = [s for s in summaries if s.latency_ms is not None]
    offered = [s.offered_per_s for s in answered]
    for name, marker, colour in (("p50", "o", 0), ("p90", "s", 2), ("p99", "^", 1)):
        values = [getattr(s.latency_ms, name) for s in answered]
        left.plot(offered, values, marker=marker, color=_COLOURS[colour], label=name.upper())
    left.axhline(summaries[0].target_ms, color="#555555", linestyle=(0, (4, 3)), linewidth=1, label="target")
    left.set(xlabel="offered, requests/s", ylabel="latency of OK answers, ms", yscale="log")
    left.legend(frameon=False)
    rates = [s.offered_per_s for s in summaries]
    right.plot([0, max(rates)], [0, max(rates)], color="#555555", linestyle=(0, (4, 3)), linewidth=1, label="all")
    right.plot(rates, [s.achieved_per_s for s in summaries], marker="s", color=_COLOURS[5], label="OK")
    right.plot(rates, [s.goodput_per_s for s in summaries], marker="o", color=_COLOURS[0], label="goodput")
    right.set(xlabel="offered, requests/s", ylabel="answered, requests/s", xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False)
    return figure


def _stage_chart(summaries: Sequence[Summary]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for panel, name, source in zip(figure.subplots(1, 2), ("median", "P99"), ("stage_ms", "stage_p99_ms"), strict=True):
        answered = [s for s in summaries if getattr(s, source)]
        places, below = np.arange(len(answered)), np.zeros(len(answered))
        for stage, colour in zip(_SERVER_STAGES, _COLOURS, strict=False):
            values = np.array([getattr(s, source)[stage] for s in answered])
            panel.bar(places, values, 0.7, bottom=below, color=colour, label=stage)
            below += values
        panel.set_xticks(places, [f"{s.offered_per_s:.0f}" for s in answered])
        panel.set(xlabel="offered, requests/s", ylabel=f"{name} of each stage, ms")
        panel.grid(visible=False, axis="x")
    figure.legend(
        *panel.get_legend_handles_labels(), loc="outside upper left", ncols=len(_SERVER_STAGES), frameon=False
    )
    return figure


def _course_chart(summary: Summary, samples: Samples) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    statuses = np.array(samples.statuses)
    for status, colour in ((OK, _COLOURS[0]), (REFUSED, _COLOURS[1])):
        chosen = statuses == status
        if chosen.any():
            left.plot(
                samples.due_s[chosen], samples.latency_s[chosen] * 1e3, ".", markersize=2, alpha=0.5, color=colour,
                label=status,
            )  # fmt: skip
    left.axhline(summary.target_ms, color="#555555", linestyle=(0, (4, 3)), linewidth=1)
    left.set(xlabel="due, seconds", ylabel="latency, ms", yscale="log")
    latency_ms = np.sort(samples.latency_s[statuses == OK]) * 1e3
    if len(latency_ms):
        left.legend(frameon=False, markerscale=4)
        beyond = 1 - np.arange(len(latency_ms)) / len(latency_ms)
        right.plot(1 / beyond, latency_ms, color=_COLOURS[0])
    right.axhline(summary.target_ms, color="#555555", linestyle=(0, (4, 3)), linewidth=1)
    right.set(xscale="log", xlabel="percentile", ylabel="latency, ms")
    right.set_xticks([1, 2, 10, 100, 1000], ["0", "50", "90", "99", "99.9"])
    right.minorticks_off()
    return figure


def _picture(figure: Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{content}">'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
