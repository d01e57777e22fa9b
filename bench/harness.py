"""The form of all benchmark results: measured values, machine, claims and raw data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from bench import provenance
from server.cli.console import console

ROOT = provenance.ROOT
RESULTS = ROOT / "bench" / "results"

#: A row that holds lists or mappings of its own stands on one line up to this length.
_LINE_MAX = 400

Direction = Literal["at_least", "at_most"]
_SIGNS: dict[Direction, str] = {"at_least": ">=", "at_most": "<="}

_UNMEASURED = "it was not measured"

#: All measured values, as plain JSON.
Raw = dict[str, Any]


class BenchmarkError(Exception):
    """A benchmark or its results cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A measured value and its target, which was set before the measurement.

    `measured` is None where the run gave no value to judge by; `unjudged` says why. Such a claim does not hold.
    """

    name: str
    measured: float | None
    target: float
    unit: str
    direction: Direction
    unjudged: str = field(default=_UNMEASURED, compare=False)

    @staticmethod
    def ratio(
        name: str,
        over: float | None,
        under: float | None,
        target: float,
        direction: Direction,
        without: str = _UNMEASURED,
    ) -> Claim:
        """Claim a ratio of two measured values; without one of them, or over zero, it is unjudged because `without`."""
        measured = None if over is None or not under else over / under
        return Claim(name, measured, target, "ratio", direction, without)

    @property
    def holds(self) -> bool:
        """Whether the value meets its target. False for NaN, and without a value."""
        if self.measured is None:
            return False
        if self.direction == "at_least":
            return self.measured >= self.target
        return self.measured <= self.target

    def as_json(self) -> dict[str, Any]:
        fields = {**asdict(self), "holds": self.holds}
        if self.measured is not None:
            del fields["unjudged"]
        return fields

    @staticmethod
    def from_json(value: Any) -> Claim:
        """Parse a claim. Raises BenchmarkError if a field is missing, or if `holds` contradicts the numbers."""
        try:
            fields = str(value["name"]), float(value["target"]), str(value["unit"]), value["direction"]
            if "unjudged" in value:
                claim = Claim(fields[0], None, *fields[1:], str(value["unjudged"]))
            else:
                claim = Claim(fields[0], float(value["measured"]), *fields[1:])
            held = value["holds"]
        except (KeyError, TypeError, ValueError) as error:
            raise BenchmarkError(f"no claim: {error!r} in {value!r}") from error
        if claim.direction not in get_args(Direction):
            raise BenchmarkError(f"claim {claim.name!r}: unknown direction {claim.direction!r}")
        if held is not claim.holds:
            raise BenchmarkError(f"claim {claim.name!r} says holds={held}, its numbers say {claim.holds}")
        return claim


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What follows from the raw results of a benchmark.

    Attributes:
        summary: the most important numbers; each name includes the unit. None where the run gave no value.
        claims: the claims that the benchmark tests.
        table: the results as Markdown, written next to the JSON.
        chart: a chart as SVG, written next to the table.
    """

    summary: Mapping[str, float | None]
    claims: tuple[Claim, ...]
    table: str | None = None
    chart: bytes | None = None


def run(
    name: str,
    measure: Callable[[], Iterable[Raw]],
    conclude: Callable[[Raw], Conclusion],
    results: Path | None = RESULTS,
) -> tuple[Raw, Conclusion]:
    """Measure, conclude, print, and write `results/name.json`; with `results` None, write nothing.

    Everything measured so far is kept in `results/name.raw` until the result is written, so that a failure loses none
    of it: `conclude_kept` goes on from there.
    """
    about = {"name": name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": provenance.machine()}
    kept = None if results is None else results / f"{name}.raw"
    text = ""
    try:
        for raw in measure():
            # Also where nothing is kept: as it would be read from the file, so that the same follows from it.
            text = json.dumps({**about, "complete": False, "raw": raw})
            if kept is not None:
                _replace(kept, text)
        content = {**json.loads(text), "complete": True}
        if kept is not None:
            _replace(kept, json.dumps(content))
        return content["raw"], _concluded(content, conclude, results)
    except BaseException:
        if kept is not None and text:
            console(stderr=True).print(
                f"{name} failed. Its raw results are kept in {kept}. "
                f"Once the fault is repaired: python -m bench conclude {name}",
                style="bold red", soft_wrap=True,
            )  # fmt: skip
        raise


def conclude_kept(name: str, conclude: Callable[[Raw], Conclusion], results: Path = RESULTS) -> Conclusion:
    """Conclude again from raw results: those kept by a run that failed, or those of the last result.

    What was measured only in part is printed and not written.

    Raises:
        BenchmarkError: there is neither, or the file is unreadable.
    """
    kept = next((path for path in (results / f"{name}.raw", results / f"{name}.json") if path.exists()), None)
    if kept is None:
        raise BenchmarkError(f"{results} has no {name}.raw and no {name}.json; measure it: python -m bench {name}")
    try:
        content = json.loads(kept.read_text())
        whole = content.pop("complete", True)
        about = {key: content[key] for key in ("name", "date", "machine", "raw")}
    except (ValueError, KeyError) as error:
        raise BenchmarkError(f"{kept.name}: {error!r}") from error
    if not whole:
        console(stderr=True).print(f"{kept} is of a run that did not end. This is what its part says:", style="bold")
    try:
        return _concluded(about, conclude, results if whole else None)
    except KeyError as error:
        raise BenchmarkError(
            f"{kept} has no {error}, which the conclusions need: an older form of {name} measured it, or the run ended "
            "too early; measure again"
        ) from error


def _concluded(content: dict[str, Any], conclude: Callable[[Raw], Conclusion], results: Path | None) -> Conclusion:
    """Conclude from `content["raw"]`, print it, and write the result in place of what was kept."""
    name = content["name"]
    concluded = conclude(content["raw"])
    out = console()
    out.print(summary_table(name, concluded.summary))
    out.print(claims_table({name: concluded.claims}))
    if results is not None:
        about = {key: content[key] for key in ("name", "date", "machine")}
        claims = [claim.as_json() for claim in concluded.claims]
        text = as_text({**about, "claims": claims, "summary": concluded.summary, "raw": content["raw"]})
        _replace(results / f"{name}.json", text)
        if concluded.table is not None:
            (results / f"{name}.md").write_text(concluded.table)
        if concluded.chart is not None:
            (results / f"{name}.svg").write_bytes(concluded.chart)
        (results / f"{name}.raw").unlink(missing_ok=True)
    return concluded


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def whole(measured: Iterable[Raw]) -> Raw:
    """Return the last of the raw results that a measurement yields, which is all of them."""
    *_, raw = measured
    return raw


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


def read_results(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read every result in a folder, by benchmark, its claims as `Claim`s. Raises BenchmarkError."""
    found = {}
    for path in sorted(results.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            content["claims"] = tuple(Claim.from_json(value) for value in content["claims"])
            found[content["name"]] = content
        except (OSError, ValueError, KeyError, TypeError, BenchmarkError) as error:
            raise BenchmarkError(f"{path.name}: {error}") from error
    return found


def read_claims(results: Path = RESULTS) -> dict[str, tuple[Claim, ...]]:
    """Read the claims of every result in a folder, by benchmark. Raises BenchmarkError."""
    return {name: content["claims"] for name, content in read_results(results).items()}


def markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a titled Markdown table. All columns except the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summary_table(name: str, summary: Mapping[str, float | None]) -> Table:
    table = Table("what", "value", title=name, title_justify="left")
    table.columns[1].justify = "right"
    for what, value in summary.items():
        table.add_row(what, "none" if value is None else f"{value:.4g}")
    return table


def claims_table(claims: Mapping[str, Sequence[Claim]]) -> Table:
    table = Table("benchmark", "claim", "measured", "target", "holds", title="claims", title_justify="left")
    for name, made in claims.items():
        for claim in made:
            target = f"{_SIGNS[claim.direction]} {claim.target:g} {claim.unit}"
            if claim.measured is None:
                measured, verdict = f"cannot be judged: {claim.unjudged}", Text("?", "bold yellow")
            else:
                measured = f"{claim.measured:.4g} {claim.unit}"
                verdict = Text("yes", "green") if claim.holds else Text("NO", "bold red")
            table.add_row(name, claim.name, measured, target, verdict)
    return table
