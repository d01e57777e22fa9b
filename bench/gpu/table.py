"""Write the results of a run as a JSON file and a Markdown page: `python -m bench.gpu.table DIR`.

It works with any recorded lines, even after a kill: missing numbers appear as "not measured", with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu.numbers import DRY_FILE, Numbers, file_of, read
from bench.gpu.plan import PHASES
from bench.gpu.predicted import Range, predictions
from bench.gpu.results import ENCODER_GOAL, RANKER_GOAL, Line, Results, as_json, results
from bench.harness import as_text

NOT_MEASURED = "not measured"
#: Floating-point operations per row of the published encoder's serving form, computing only what the readout reads.
ROW_FLOP = 4.1e6
#: Bytes per row that must move through device memory, in float32: the candidate and the readout; without fusion, also
#: the intermediates of two layers.
FUSED_BYTES, UNFUSED_BYTES = 4 * (32 + 960), 0.57e6
#: The metrics of ncu that the page shows.
_NCU = ("Duration", "Registers Per Thread", "Achieved Occupancy", "Compute (SM) Throughput", "Memory Throughput")


def page(found: Results, predicted: Mapping[str, Mapping[str, Range]]) -> str:
    """Return the page as Markdown."""
    card, device = found.lines["facts", "card"], found.lines["ceilings", "device"]
    named = next((line["name"] for line in (card, device) if "name" in line), None)
    title = f"# {named}" if named else f"# A card whose name was {_why(card)}"
    if found.dry_run:
        title, predicted = "# DRY RUN: not one number here means anything", {}
    parts = [
        title,
        _facts(found),
        _ceilings(found),
        _plain(found, "parity"),
        _rates(found, "encoder", ENCODER_GOAL, predicted),
        _rates(found, "tuning", ENCODER_GOAL, predicted),
        _rates(found, "engine", RANKER_GOAL, predicted),
        _plain(found, "served"),
        _plain(found, "public"),
        _checks(found),
    ]
    if found.unreadable:
        parts.append(f"{found.unreadable} lines could not be read: the run was killed while it wrote them.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


_TITLES = {
    "parity": "Parity",
    "encoder": "The encoder",
    "tuning": "The kernel's free choices",
    "engine": "The whole ranker through the engine",
    "served": "Served through gRPC",
    "public": "Public shapes",
}
#: Plain tables: the subject of the lines, then (heading, key in a line, format) of each column.
_COLUMNS: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "parity": (
        "compiled as",
        (
            ("difference from float64, of a row's norm", "relative_difference", ".1e"),
            ("allowed", "allowed", ".0e"),
            ("holds", "holds", ""),
        ),
    ),
    "served": (
        "offered",
        (
            ("P50 ms", "ms_p50", ".2f"),
            ("P99 ms", "ms_p99", ".2f"),
            ("goodput/s", "goodput_s", ",.0f"),
            ("of what was offered", "good_share", ".1%"),
            ("statuses", "statuses", ""),
        ),
    ),
    "public": (
        "what",
        (
            ("P50 ms", "ms_p50", ".3f"),
            ("published ms", "published_ms", "g"),
            ("sequences or candidates/s", "rows_s", ",.0f"),
        ),
    ),
}
#: Results that are not rates: one line each, with all their numbers.
_CHECKS = {
    "engine": ("goldens", "memory", "warm-up"),
    "two-engines": ("opened under load",),
    "served": ("start",),
    "ncu": ("one launch",),
    "sanitizer": ("memcheck",),
}


def _plain(found: Results, phase: str) -> str:
    about, columns = _COLUMNS[phase]
    rows = []
    for what, line in found.of(phase):
        if what not in _CHECKS.get(phase, ()):
            cells = [_number(line, key, form) for _, key, form in columns]
            rows.append([what, *([_why(line), *[""] * (len(cells) - 1)] if "not_measured" in line else cells)])
    return _table(_TITLES[phase], (about, *(heading for heading, _, _ in columns)), rows)


def _rates(found: Results, phase: str, goal: float, predicted: Mapping[str, Mapping[str, Range]]) -> str:
    """Return a table of rows/s, compared with the prediction, the goal, and the card's peaks in this run."""
    peak, copies = found.value("ceilings", "bf16 product", "flop_s"), found.value("ceilings", "copy", "bytes_s")
    compared = not found.dry_run
    kernel = compared and phase != "engine"
    rows = []
    for what, line in found.of(phase):
        if what in _CHECKS.get(phase, ()):
            continue
        said = _predicted(predicted.get(phase, {}).get(what))
        if "rows_s" not in line:
            rows.append([what, _why(line), said, "", "", "", "", ""])
            continue
        rate = float(line["rows_s"])
        moved = rate * (UNFUSED_BYTES if "published" in what else FUSED_BYTES)
        of_each = (
            f"{rate / goal:.2f}" if compared else "",
            f"{rate * ROW_FLOP / peak:.1%}" if peak and kernel else "",
            f"{moved / copies:.1%}" if copies and kernel else "",
        )
        times = (_number(line, key, ".3f") for key in ("ms_p50", "ms_p99"))
        rows.append([what, f"{rate:,.0f}", said, *of_each, *times])
    shares = ("of the goal", "of the peak", "of the copies")
    return _table(_TITLES[phase], ("requests x rows", "rows/s", "predicted", *shares, "P50 ms", "P99 ms"), rows)


def _checks(found: Results) -> str:
    rows = []
    for phase, names in _CHECKS.items():
        for name in names:
            line = dict(found.lines[phase, name])
            if "metrics" in line:
                line["metrics"] = {k: v for k, v in line["metrics"].items() if any(f": {name}" in k for name in _NCU)}
            rows.append([f"{phase}: {name}", _said(line)])
    for phase in PHASES:
        ended = found.lines.get((phase, "the phase"), {}).get("ended")
        if ended:
            rows.append([f"{phase}: the phase", ended])
    return _table("Checks", ("what", "found"), rows)


def _facts(found: Results) -> str:
    versions = found.lines["facts", "versions"]
    packages = versions.get("packages", {})
    named = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "numpy", "onnx") if name in packages)
    told = [*found.of("facts"), ("device", found.lines["ceilings", "device"])]
    lines = [f"- {what}: {_said(line)}" for what, line in told]
    return "\n".join([*lines, *([f"- packages: {named}"] if named else [])])


def _said(line: Line) -> str:
    """Return all values of a line as text."""
    if "not_measured" in line:
        return _why(line)
    known = {key: value for key, value in line.items() if key not in ("phase", "what", "dry_run", "packages")}
    return json.dumps(known).strip("{}").replace('"', "")


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _number(line: Line, key: str, form: str) -> str:
    match line.get(key):
        case None:
            return ""
        case bool(holds):
            return "yes" if holds else "NO"
        case int(value) | float(value):
            return f"{value:{form}}"
        case other:
            return json.dumps(other)


def _why(line: Line) -> str:
    return f"{NOT_MEASURED}: {line.get('not_measured', 'nothing was said')}"


def _ceilings(found: Results) -> str:
    product, copy = (
        _scaled(found, what, key, unit)
        for what, key, unit in (("bf16 product", "flop_s", "TFLOP/s"), ("copy", "bytes_s", "TB/s"))
    )
    return f"bf16 products: {product}. Copies within its memory: {copy}."


def _scaled(found: Results, what: str, key: str, unit: str) -> str:
    value = found.value("ceilings", what, key)
    return f"{value / 1e12:.3g} {unit}" if value is not None else _why(found.lines["ceilings", what])


def _predicted(said: Range | None) -> str:
    return "" if said is None else f"{said[0] / 1e6:.3g}M to {said[1] / 1e6:.3g}M"


def write(out: Path, *, dry_run: bool) -> Path:
    """Write the JSON file and the page of a folder. Return the path of the page."""
    found = results(read(file_of(out, dry_run=dry_run)), dry_run=dry_run)
    name = "dry-run" if dry_run else "gpu"
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / f"{name}.json", as_text(as_json(found)))
    return _replace(out / f"{name}.md", page(found, predictions()))


def _replace(file: Path, content: str) -> Path:
    """Write a file atomically: a kill leaves the old or the new content."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(content)
    return part.replace(file)


def table(out: Path, numbers: Numbers) -> None:
    """Write the table. This is the last phase of a run."""
    print(write(out, dry_run=numbers.dry_run).read_text())


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the lines")
    out = parser.parse_args().out
    print(write(out, dry_run=(out / DRY_FILE).exists()).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
