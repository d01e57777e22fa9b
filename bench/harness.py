"""The form of all benchmark results: measured values, machine, claims and raw data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from server.cli.console import console

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

_PACKAGES = ("grpcio", "lmdb", "numexpr", "numpy", "onnxruntime", "openvino", "protobuf", "torch", "uvloop")

#: A row that holds lists or mappings of its own stands on one line up to this length.
_LINE_MAX = 400

Direction = Literal["at_least", "at_most"]
_SIGNS: dict[Direction, str] = {"at_least": ">=", "at_most": "<="}


class BenchmarkError(Exception):
    """A benchmark or its results cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A measured value and its target, which was set before the measurement."""

    name: str
    measured: float
    target: float
    unit: str
    direction: Direction

    @property
    def holds(self) -> bool:
        """Whether the value meets its target. False for NaN."""
        if self.direction == "at_least":
            return self.measured >= self.target
        return self.measured <= self.target

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    @staticmethod
    def from_json(value: Any) -> Claim:
        """Parse a claim. Raises BenchmarkError if a field is missing, or if `holds` contradicts the numbers."""
        try:
            claim = Claim(
                str(value["name"]), float(value["measured"]), float(value["target"]), str(value["unit"]),
                value["direction"],
            )  # fmt: skip
            held = value["holds"]
        except (KeyError, TypeError, ValueError) as error:
            raise BenchmarkError(f"no claim: {error!r} in {value!r}") from error
        if claim.direction not in get_args(Direction):
            raise BenchmarkError(f"claim {claim.name!r}: unknown direction {claim.direction!r}")
        if held is not claim.holds:
            raise BenchmarkError(f"claim {claim.name!r} says holds={held}, its numbers say {claim.holds}")
        return claim


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of a benchmark.

    Attributes:
        summary: the most important numbers; each name includes the unit.
        claims: the claims that the benchmark tests.
        raw: all measured values of all runs, as plain JSON.
        table: the results as Markdown, written next to the JSON.
    """

    summary: dict[str, float]
    claims: tuple[Claim, ...]
    raw: dict[str, Any]
    table: str | None = None


def run(name: str, measure: Callable[[], Measurement], results: Path | None = RESULTS) -> Measurement:
    """Measure, print, and write `results/name.json`; with `results` None, write nothing."""
    started = datetime.now(UTC)
    measured = measure()
    out = console()
    out.print(summary_table(name, measured.summary))
    out.print(claims_table({name: measured.claims}))
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        content = {
            "name": name,
            "date": started.isoformat(timespec="seconds"),
            "machine": machine(),
            "claims": [claim.as_json() for claim in measured.claims],
            "summary": measured.summary,
            "raw": measured.raw,
        }
        (results / f"{name}.json").write_text(as_text(content))
        if measured.table is not None:
            (results / f"{name}.md").write_text(measured.table)
    return measured


def as_text(content: Mapping[str, Any]) -> str:
    """Return a result as JSON for a repository: one line for each row and for each series of raw values.

    A mapping or list without nested ones takes one line, whatever its length. So does a short one with nested ones.

    Raises:
        ValueError: a number is not finite.
    """
    return "".join([*_lines(content, 0), "\n"])


def _lines(value: Any, depth: int) -> Iterator[str]:
    line = json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        opening, closing = "{}"
        members = [(f"{json.dumps(key)}: ", member) for key, member in value.items()]
    elif isinstance(value, list):
        opening, closing = "[]"
        members = [("", member) for member in value]
    else:
        members = []
    if len(line) <= _LINE_MAX or not any(isinstance(member, dict | list) for _, member in members):
        yield line
        return
    for i, (key, member) in enumerate(members):
        yield f"{',' if i else opening}\n{' ' * (depth + 1)}{key}"
        yield from _lines(member, depth + 1)
    yield f"\n{' ' * depth}{closing}"


def read_claims(results: Path = RESULTS) -> dict[str, tuple[Claim, ...]]:
    """Read the claims of every result in a folder, by benchmark. Raises BenchmarkError."""
    found = {}
    for path in sorted(results.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            found[content["name"]] = tuple(Claim.from_json(value) for value in content["claims"])
        except (OSError, ValueError, KeyError, TypeError, BenchmarkError) as error:
            raise BenchmarkError(f"{path.name}: {error}") from error
    return found


def machine() -> dict[str, Any]:
    """Describe hardware and software that the numbers depend on, without names or paths of the machine."""
    cpu = _cpu_fields()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_core": int(cpu.get("siblings", 1)) // max(1, int(cpu.get("cpu cores", 1))),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {package: metadata.version(package) for package in _PACKAGES},
        "commit": _commit(),
    }


def _cpu_fields() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo, or {} if there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str | None:
    """Return the commit of the sources, marked if they have changed since. Return None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a titled Markdown table. All columns except the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summary_table(name: str, summary: Mapping[str, float]) -> Table:
    table = Table("what", "value", title=name, title_justify="left")
    table.columns[1].justify = "right"
    for what, value in summary.items():
        table.add_row(what, f"{value:.4g}")
    return table


def claims_table(claims: Mapping[str, Sequence[Claim]]) -> Table:
    table = Table("benchmark", "claim", "measured", "target", "holds", title="claims", title_justify="left")
    for name, made in claims.items():
        for claim in made:
            verdict = Text("yes", "green") if claim.holds else Text("NO", "bold red")
            target = f"{_SIGNS[claim.direction]} {claim.target:g} {claim.unit}"
            table.add_row(name, claim.name, f"{claim.measured:.4g} {claim.unit}", target, verdict)
    return table
