"""What a check of a log finds."""

from __future__ import annotations

from dataclasses import dataclass

#: So many rows are named for each problem; the others are counted.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a log.

    Attributes:
        where: the file.
        row: the row in the file, from 0; None if it is about the whole file.
        field: the column; empty if it is about the whole file.
        what: what is wrong.
        fix: what to do.
    """

    where: str
    row: int | None
    field: str
    what: str
    fix: str

    def __str__(self) -> str:
        at = "" if self.row is None else f", row {self.row}"
        return f"{self.where}{at}{', ' if self.field else ''}{self.field}: {self.what}"
