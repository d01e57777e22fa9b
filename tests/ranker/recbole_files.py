"""Generates valid and invalid atomic files to fuzz the reader, and compares it with a slow reference reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import strategies as st

from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.errors import DatasetError
from tests.ranker.slow_recbole import Refused, Rule, SlowDataset, slow_read

_NAMES = ("rating:float", "dwell:float", "events:token_seq", "kind:token", "weights:float_seq", "movie_title:token_seq")
_BAD_NAMES = (
    "rating:float", "user_id:token", "dwell", ":float", "x:int", "", " y:float", "y :token", "a:b:token",
    "item_id:float",
)  # fmt: skip
_IDS = ("1", "2", "7", "u2", "pin/3", "é", "p4", "u5", "u1", "12345678901234567890", '"q"', "nan", "1e5", "-3")
_BAD_IDS = ("", "07", " ", "u1 ", "\u00a0u", "1.0", "17.", "1.7E+09", "1,234", "\u2028", "0.0")
_TIMES = ("1", "0", "1700000000", "1.7e9", "1700000000.125", "1700000000.0005", "1.0009", " 5 ", "+5", "7258118399")
_BAD_TIMES = (
    "", "-1", "1700000000000", "1.7e18", "nan", "inf", "1e400", "7258118400", "2020-01-01", "1,700", "-", "1_0",
)  # fmt: skip
_NUMBERS = ("1", "5", "4.0", "4", "2", "0.5", "3", ".5", "5.", "-0", "1e0", "4.999999999999999999")
_BAD_NUMBERS = (
    "-", "", "NaN", "10", "-1", "6", "1e39", "4,5", "0x1", "--1", "+-1", "e5", "\u0664", "1e999999999999", "NA",
)  # fmt: skip
_WORDS = ("save", "like", "", "save like", "hide", "like  save", "Save", "save ", " save", "x", " ")
#: Changes to a line: none in most files; in some, the line is cut, repeated or extended.
_NOTHING: tuple[tuple[str, ...], ...] = ((),) * 12
_SPOILS = (
    *_NOTHING, ("",), ("", "", ""), (" ",), ("\t",), ("cut",), ("\ufeff",), ("\r",), ("\0",), ("header",), *_NOTHING,
)  # fmt: skip
_ENDS = ("\n", "\n", "\n", "\r\n")

Outcome = Literal["read", "refused"]


@dataclass(frozen=True)
class Files:
    """The files of a folder, and the rules of its `actions.toml` (None without one)."""

    inter: bytes
    item: bytes | None
    rules: tuple[Rule, ...] | None


def _once_in(count: int) -> st.SearchStrategy[bool]:
    """Draw True about once in so many draws; never at the ends of the range, which hypothesis draws more often."""
    return st.sampled_from([place == count // 2 for place in range(count)])


def _rarely(good: st.SearchStrategy[str], bad: st.SearchStrategy[str], count: int) -> st.SearchStrategy[str]:
    return _once_in(count).flatmap(lambda drawn: bad if drawn else good)


_TEXT = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]), max_size=4)
_CELLS: Mapping[str, st.SearchStrategy[str]] = {
    "id": _rarely(st.sampled_from(_IDS), st.sampled_from(_BAD_IDS) | _TEXT, 150),
    "time": _rarely(st.sampled_from(_TIMES), st.sampled_from(_BAD_TIMES) | _TEXT, 100),
    "rating": _rarely(st.sampled_from(_NUMBERS), st.sampled_from(_BAD_NUMBERS) | _TEXT, 100),
    "float": _rarely(st.sampled_from((*_NUMBERS, "16777216")), st.sampled_from(_BAD_NUMBERS), 12),
    "token": _rarely(st.sampled_from(_WORDS), _TEXT, 20),
}


def _cell(described: str) -> st.SearchStrategy[str]:
    name, _, kind = described.rpartition(":")
    known = {"user_id": "id", "item_id": "id", "timestamp": "time", "rating": "rating"}
    return _CELLS[known.get(name, "float" if kind.startswith("float") else "token")]


@st.composite
def _table(draw: st.DrawFn, needed: tuple[str, ...]) -> bytes:
    columns = draw(st.permutations(needed))
    if draw(_once_in(25)):
        columns.insert(draw(st.integers(0, len(columns))), draw(st.sampled_from(_BAD_NAMES)))
    if draw(_once_in(40)):
        columns.pop(draw(st.integers(0, len(columns) - 1)))
    cells = [_cell(column) for column in columns]
    lines = ["\t".join(columns), *("\t".join(draw(st.tuples(*cells))) for _ in range(draw(st.integers(0, 5))))]
    for spoil in draw(st.sampled_from(_SPOILS)):
        at = draw(st.integers(0, len(lines)))
        if spoil == "cut" and at < len(lines):
            lines[at] = lines[at].rpartition("\t")[0]
        elif spoil == "header":
            lines.insert(at, lines[0])
        elif spoil in {"", " "} or at == len(lines):
            lines.insert(at, spoil.replace("cut", ""))
        else:
            lines[at] += spoil
    ends = draw(st.sampled_from(_ENDS))
    text = "".join(line + ends for line in lines)
    if draw(st.booleans()):
        text = text.removesuffix(ends)
    content = draw(st.sampled_from((b"", b"", b"", b"\xef\xbb\xbf"))) + text.encode()
    if draw(_once_in(60)):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.sampled_from((b"\xff", b"\xc3", b"\n", b"\t", b"\r\n", b'"'))) + content[at:]
    return content


_RULES: tuple[dict[str, Any], ...] = (
    {"name": "save", "column": "events", "any_of": ["save", "Save"]},
    {"name": "like", "column": "kind", "any_of": ["like", "save like"]},
    {"name": "high", "column": "dwell", "at_least": 4},
    {"name": "huge", "column": "dwell", "at_least": 16_777_217},
    {"name": "exact", "column": "rating", "at_least": 4.999999999999999},
    {"name": "low", "column": "rating", "at_most": 2},
    {"name": "weighed", "column": "weights", "any_of": ["1"]},
    {"name": "any"},
)


def _rules(columns: list[str]) -> st.SearchStrategy[tuple[Rule, ...]]:
    """Draw one or two rules, sometimes for a column that does not exist."""
    *about_columns, catch_all = _RULES
    there = [rule for rule in about_columns if any(rule["column"] in column for column in columns)]
    one = st.sampled_from([*there, *there, *there, *there, *about_columns])
    return st.just((catch_all,)) | st.builds(lambda rule, rest: (rule, *rest), one, st.sampled_from(((catch_all,), ())))


@st.composite
def files(draw: st.DrawFn) -> Files:
    """Draw the files of a folder; about half of the folders are valid."""
    extra = draw(st.lists(st.sampled_from(_NAMES), max_size=3, unique=True))
    rules = draw(st.none() | _rules(extra))
    inter = draw(_table(("user_id:token", "item_id:token", "timestamp:float", *extra)))
    described = draw(st.sampled_from(((), ("movie_title:token_seq",), ("year:float", "name:token"))))
    return Files(inter, draw(st.none() | _table(("item_id:token", *described))), rules)


def write_files(folder: Path, drawn: Files) -> None:
    """Write the files into a folder, in place of earlier ones."""
    (folder / "toy.inter").write_bytes(drawn.inter)
    rules = None if drawn.rules is None else _toml(drawn.rules).encode()
    for name, content in (("toy.item", drawn.item), ("actions.toml", rules)):
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(content)


def _toml(rules: tuple[Rule, ...]) -> str:
    lines = []
    for rule in rules:
        lines += ["[[actions]]", 'meaning = "m"', "affinity = 1.0"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in rule.items()]
    return "\n".join(lines) + "\n"


def compared(folder: Path, drawn: Files) -> Outcome:
    """Read drawn files with both readers.

    Returns:
        How it ended.

    Raises:
        AssertionError: one reader accepts what the other refuses, or they differ in the data or in the faulty line.
    """
    write_files(folder, drawn)
    try:
        expected = slow_read(folder, drawn.rules)
    except Refused as refused:
        _is_refused(folder, refused)
        return "refused"
    _is_equal(read_atomic(folder), expected)
    return "read"


def _is_refused(folder: Path, refused: Refused) -> None:
    with pytest.raises(DatasetError) as caught:
        read_atomic(folder)
    named = re.search(r"toy\.(inter|item), line (\d+)", str(caught.value))
    fault = (named[1], int(named[2])) if named else ("inter", None)
    assert fault in refused.faults, f"{caught.value}: the reference reader found the faults {refused.faults}"


def _is_equal(dataset: AtomicDataset, expected: SlowDataset) -> None:
    found = [
        (user, pin, time_ms, tuple(labels))
        for user, pin, time_ms, labels in zip(
            dataset.users.tolist(),
            dataset.pins.tolist(),
            dataset.time_ms.tolist(),
            dataset.labels.tolist(),
            strict=True,
        )
    ]
    assert found == expected.interactions
    assert dict(dataset.titles) == expected.titles
    assert dict(dataset.tokens) == expected.tokens
