"""All that was measured as one JSON and one page, made from the lines alone: `python -m bench.gpu.table DIR`.

Works on whatever lines there are, also where the run was killed: what is missing says "not measured", and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.numbers import DRY_FILE, Numbers, Read, file_of, read
from bench.gpu.plan import PHASES, expected

NOT_MEASURED = "not measured"
PREDICTED = Path(__file__).with_name("predicted.json")
#: Floating-point operations of a row of the published encoder, exactly rewritten and with only what the readout reads.
ROW_FLOP = 4.1e6
#: Bytes of a row that must move through the device's memory, in float32: the candidate in, the readout out; unfused,
#: two layers' intermediates besides.
FUSED_BYTES, UNFUSED_BYTES = 4 * (32 + 960), 0.57e6
#: Rows a second on one H200: of the encoder, and of the whole ranker.
ENCODER_GOAL, RANKER_GOAL = 10e6, 5e6
#: Of ncu's metrics, those on the page.
_NCU = ("Duration", "Registers Per Thread", "Achieved Occupancy", "Compute (SM) Throughput", "Memory Throughput")

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """What a folder's lines say.

    Attributes:
        dry_run: whether they mean nothing.
        lines: by (phase, what): the last one, a measured one before one that was not; in the order of the phases.
        unreadable: lines that a kill cut off.
    """

    dry_run: bool
    lines: Mapping[tuple[str, str], Line]
    unreadable: int

    def of(self, phase: str) -> Iterator[tuple[str, Line]]:
        """Return every number of a phase with its name, measured or not."""
        return ((what, line) for (of, what), line in self.lines.items() if of == phase and what != "the phase")

    def value(self, phase: str, what: str, key: str) -> float | None:
        value = self.lines.get((phase, what), {}).get(key)
        return float(value) if isinstance(value, int | float) else None


def results(found: Read, *, dry_run: bool) -> Results:
    """Sort lines, and add one for everything that should be there and is not."""
    last: dict[tuple[str, str], Line] = {}
    for line in found.lines:
        place = line["phase"], str(line["what"])
        if bool(line.get("dry_run")) is dry_run and (
            "not_measured" not in line or "not_measured" in last.get(place, line)
        ):
            last[place] = line
    ordered: dict[tuple[str, str], Line] = {}
    for phase in PHASES:
        ended = last.get((phase, "the phase"), {"ended": "the phase did not run, or was killed with all of the run"})
        why = ended.get("ended", "the phase ended without it")
        for what in expected(phase, dry_run=dry_run):
            ordered[phase, what] = last.get((phase, what), {"phase": phase, "what": what, "not_measured": why})
        ordered |= {place: line for place, line in last.items() if place[0] == phase and place not in ordered}
    return Results(dry_run, ordered, found.unreadable)


def as_json(found: Results) -> dict[str, Any]:
    """Return everything in the form that all results of benchmarks have."""
    missing = [place for place, line in found.lines.items() if "not_measured" in line]
    return {
        "name": "gpu",
        "dry_run": found.dry_run,
        "claims": [] if found.dry_run else list(_claims(found)),
        "summary": {"numbers": len(found.lines) - len(missing), "not measured": len(missing)},
        "raw": {"lines": list(found.lines.values()), "unreadable": found.unreadable},
    }


def _claims(found: Results) -> Iterator[dict[str, Any]]:
    """Compare what was measured with what is required; what was not measured claims nothing."""
    differences = [line["relative_difference"] for _, line in found.of("parity") if "relative_difference" in line]
    wanted = [("largest relative difference of the fused kernel", max(differences, default=None, key=float), 1e-2, "")]
    for phase, goal, name in (("encoder", ENCODER_GOAL, "encoder"), ("engine", RANKER_GOAL, "whole ranker")):
        rates = [line["rows_s"] for what, line in found.of(phase) if "rows_s" in line and "published" not in what]
        wanted.append((f"{name}, its best batch", max(rates, default=None), goal, "rows/s"))
    for name, measured, target, unit in wanted:
        if measured is not None:
            at_least = unit == "rows/s"
            value = float(measured)
            yield {
                "name": name, "measured": value, "target": target, "unit": unit,
                "direction": "at_least" if at_least else "at_most",
                "holds": value >= target if at_least else value <= target,
            }  # fmt: skip


def page(found: Results, predicted: Mapping[str, Any]) -> str:
    """Return everything as Markdown."""
    card, versions = found.lines["facts", "card"], found.lines["facts", "versions"]
    title = f"# {card['name']}" if "name" in card else f"# A card whose name was {_why(card)}"
    if found.dry_run:
        title, predicted = "# DRY RUN: not one number here means anything", {}
    parts = [
        title,
        _facts(card, versions, found.lines["facts", "machine"], found.lines["facts", "source"]),
        _ceilings(found),
        _table(
            "Parity",
            ("compiled as", "difference from float64, of a row's norm", "allowed", "holds"),
            ([what, _number(line, "relative_difference", ".1e"), _number(line, "allowed", ".0e"), _holds(line)]
             for what, line in found.of("parity")),
        ),
        _table("The encoder", _RATES, _rates(found, "encoder", ENCODER_GOAL, predicted)),
        _table("The kernel's free choices", _RATES, _rates(found, "tuning", ENCODER_GOAL, predicted)),
        _table("The whole ranker through the engine", _RATES, _rates(found, "engine", RANKER_GOAL, predicted)),
        _table(
            "Served through gRPC",
            ("offered", "P50 ms", "P99 ms", "goodput/s", "of what was offered", "statuses"),
            ([what, _number(line, "ms_p50", ".2f"), _number(line, "ms_p99", ".2f"), _number(line, "goodput_s", ",.0f"),
              _number(line, "good_share", ".1%"), json.dumps(line.get("statuses", {}))]
             for what, line in found.of("served") if what != "start"),
        ),
        _table(
            "Public shapes",
            ("what", "P50 ms", "published ms", "sequences or candidates/s"),
            ([what, _number(line, "ms_p50", ".3f"), str(line.get("published_ms", "")), _number(line, "rows_s", ",.0f")]
             for what, line in found.of("public")),
        ),
        _table("Checks", ("what", "found"), _checks(found)),
    ]  # fmt: skip
    if found.unreadable:
        parts.append(f"{found.unreadable} lines could not be read: the run was killed while it wrote them.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


_RATES = ("requests x rows", "rows/s", "predicted", "of the goal", "of the peak", "of the copies", "P50 ms", "P99 ms")


def _rates(found: Results, phase: str, goal: float, predicted: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    peak = None if found.dry_run else found.value("ceilings", "bf16 product", "flop_s")
    copies = None if found.dry_run else found.value("ceilings", "copy", "bytes_s")
    for what, line in found.of(phase):
        if ("rows_s" not in line and "not_measured" not in line) or what in _CHECKS.get(phase, ()):
            continue
        said = _predicted(predicted.get(phase, {}).get(what))
        if "not_measured" in line:
            yield [what, _why(line), said, "", "", "", "", ""]
            continue
        rate = float(line["rows_s"])
        moved = rate * (UNFUSED_BYTES if "published" in what else FUSED_BYTES)
        yield [
            what, f"{rate:,.0f}", said,
            "" if found.dry_run else f"{rate / goal:.2f}",
            f"{rate * ROW_FLOP / peak:.1%}" if peak and phase != "engine" else "",
            f"{moved / copies:.1%}" if copies and phase != "engine" else "",
            _number(line, "ms_p50", ".3f"), _number(line, "ms_p99", ".3f"),
        ]  # fmt: skip


#: Numbers that are no rates: a line each, with everything that was found.
_CHECKS = {
    "engine": ("goldens", "memory", "warm-up"),
    "two-engines": ("opened under load",),
    "served": ("start",),
    "ncu": ("one launch",),
    "sanitizer": ("memcheck",),
}


def _checks(found: Results) -> Iterator[Sequence[str]]:
    for phase, names in _CHECKS.items():
        for name in names:
            line = dict(found.lines[phase, name])
            if "metrics" in line:
                line["metrics"] = {
                    key: one for key, one in line["metrics"].items() if any(f": {n}" in key for n in _NCU)
                }
            said = {key: value for key, value in line.items() if key not in ("phase", "what", "dry_run")}
            yield [f"{phase}: {name}", _why(line) if "not_measured" in line else _plain(said)]
    for phase in PHASES:
        ended = found.lines.get((phase, "the phase"), {}).get("ended")
        if ended:
            yield [f"{phase}: the phase", _cell(ended)]


def _facts(card: Line, versions: Line, machine: Line, source: Line) -> str:
    def said(line: Line) -> str:
        known = {key: value for key, value in line.items() if key not in ("phase", "what", "dry_run", "packages")}
        return _why(line) if "not_measured" in line else _plain(known)

    packages = versions.get("packages", {})
    named = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "numpy", "onnx") if name in packages)
    return "\n".join(
        [
            f"- card: {said(card)}",
            f"- versions: {named}; {said(versions)}",
            f"- machine: {said(machine)}",
            f"- source: {said(source)}",
        ]
    )


def _plain(values: Mapping[str, Any]) -> str:
    return _cell(json.dumps(values).strip("{}").replace('"', ""))


def _table(title: str, header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "/")


def _number(line: Line, key: str, form: str) -> str:
    if "not_measured" in line:
        return _why(line)
    value = line.get(key)
    return f"{value:{form}}" if isinstance(value, int | float) else str("" if value is None else value)


def _holds(line: Line) -> str:
    return {True: "yes", False: "NO"}.get(line.get("holds"), "")  # type: ignore[arg-type]


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


def _predicted(said: Mapping[str, Any] | None) -> str:
    if not said:
        return ""
    low, high = said["rows_s"]
    return f"{low / 1e6:g}M to {high / 1e6:g}M" if low != high else f"{low / 1e6:g}M"


def write(out: Path, *, dry_run: bool) -> Path:
    """Write a folder's JSON and page from its lines; return where the page is."""
    found = results(read(file_of(out, dry_run=dry_run)), dry_run=dry_run)
    name = "dry-run" if dry_run else "gpu"
    _replace(out / f"{name}.json", json.dumps(as_json(found), indent=1, allow_nan=False) + "\n")
    return _replace(out / f"{name}.md", page(found, json.loads(PREDICTED.read_text())))


def _replace(file: Path, content: str) -> Path:
    """Write a file so that a kill leaves the old one or the new one."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(content)
    return part.replace(file)


def table(out: Path, numbers: Numbers) -> None:
    """Write the table: the last phase of a run."""
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
