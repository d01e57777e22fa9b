"""Where a command writes its results, besides the console."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from ranker.cli.options import OptionGroup
from ranker.cli.places import check_file


class Results(Protocol):
    """What a command found, as plain values."""

    def as_json(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Results)
#: Imports and returns what writes a report; matplotlib may be missing.
ReportWriter = Callable[[], Callable[[R, Path], None]]


@dataclass(frozen=True, slots=True)
class ResultFiles(OptionGroup):
    panel = "Results"

    json_path: Annotated[Path | None, typer.Option("--json", help="File to write all numbers to, as JSON.")] = None
    report_path: Annotated[
        Path | None, typer.Option("--report", help="HTML file to write a report with charts to.")
    ] = None

    def check(self, report_writer: ReportWriter[Any]) -> None:
        """Check before the work that the results can be written after it."""
        for path in (self.json_path, self.report_path):
            if path is not None:
                check_file(path)
        if self.report_path is not None:
            report_writer()

    def write(self, results: R, report_writer: ReportWriter[R]) -> None:
        if self.json_path is not None:
            self.json_path.write_text(json.dumps(results.as_json(), indent=2, allow_nan=False) + "\n")
        if self.report_path is not None:
            report_writer()(results, self.report_path)
