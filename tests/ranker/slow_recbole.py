"""A slow reference reader of RecBole atomic files: line by line in plain Python, and without `ranker`'s code.

`ranker.data.atomic.recbole.read_atomic` must return the same. The format, as docs/train-your-own.md describes it:

* UTF-8 text; a byte order mark at the start is skipped. Lines end with `\n` or `\r\n`, blank lines are skipped.
* The first line names the columns as `name:type`, each name once; every other line has as many fields.
* Quotes are plain characters.
* `user_id`, `item_id` (tokens), `timestamp` (Unix seconds, 1970 to 2200) and the columns of the actions are read.
  Other columns are ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

YEAR_2200_S = 7_258_118_400
DIGITS = set("0123456789")

#: The actions of ratings from 1 to 5, used without an `actions.toml`.
RATINGS = (
    {"name": "save", "column": "rating", "at_least": 5},
    {"name": "like", "column": "rating", "at_least": 4},
    {"name": "hide", "column": "rating", "at_most": 2},
    {"name": "closeup"},
)
CLOSEUPS = ({"name": "closeup"},)

Rule = Mapping[str, Any]
#: The suffix of a file, and the faulty line; None if the fault is not in a single line.
Fault = tuple[str, int | None]


class Refused(Exception):  # noqa: N818 - it names the outcome
    """The files are invalid; `faults` lists all places of faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self.faults = set(faults)


@dataclass
class SlowDataset:
    """Interactions as (user, pin, time in ms, a flag for each action), oldest first."""

    interactions: list[tuple[int, int, int, tuple[bool, ...]]]
    titles: dict[int, str]
    tokens: dict[int, str]


@dataclass
class Table:
    ending: str
    kinds: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def wrong(self, line: int | None) -> None:
        self.faults.append((self.ending, line))


def slow_read(folder: Path, rules: Sequence[Rule] | None = None) -> SlowDataset:
    """Read `toy.inter`, and `toy.item` if it exists. Raises Refused."""
    inter = read_table(folder / "toy.inter")
    if inter.faults and not inter.kinds:
        raise Refused(inter.faults)
    rated = rules is None and "rating" in inter.kinds
    if rules is None:
        rules = RATINGS if rated else CLOSEUPS
    check_header(inter, rules)
    if not inter.kinds:
        raise Refused(inter.faults)
    interactions = []
    users: dict[str, int] = {}
    pins: dict[str, int] = {}
    for line, row in inter.rows:
        user, pin = row["user_id"], row["item_id"]
        users[user], pins[pin] = token_id(user), token_id(pin)
        seconds = number(row["timestamp"])
        if wrong_identifier(user) or wrong_identifier(pin) or seconds is None or not 0 <= seconds < YEAR_2200_S:
            inter.wrong(line)
        if rated:
            rating = number(row["rating"])
            if rating is None or not 0 <= rating <= 5:
                inter.wrong(line)
        labels = tuple(applies(rule, row, inter, line) for rule in rules)
        if not any(labels):
            inter.wrong(line)
        if seconds is not None and 0 <= seconds < YEAR_2200_S:
            interactions.append((users[user], pins[pin], round(seconds * 1000), labels))
    item = read_table(folder / "toy.item") if (folder / "toy.item").exists() else Table("item")
    titles = read_titles(item)
    same_id(inter, users)
    same_id(inter, {**pins, **{token: token_id(token) for token in titles}})
    if inter.faults or item.faults:
        raise Refused([*inter.faults, *item.faults])
    interactions.sort(key=lambda interaction: interaction[2])  # a stable sort: ties keep the file's order
    titles = {token: titles.get(token, token) for token in [*pins, *titles]}
    return SlowDataset(
        interactions,
        {token_id(token): title for token, title in titles.items()},
        {token_id(token): token for token in titles},
    )


def read_table(path: Path) -> Table:
    table = Table(path.suffix.removeprefix("."))
    content = path.read_bytes()
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    names: list[str] = []
    pieces = content.split(b"\n")
    for line, raw in enumerate(pieces, start=1):
        # The text after the last \n is no complete line, so a trailing \r belongs to its last field.
        ended = raw[:-1] if raw.endswith(b"\r") and line < len(pieces) else raw
        try:
            text = ended.decode()
        except UnicodeDecodeError:
            table.wrong(line)
            continue
        if "\r" in text or "\0" in text or "\ufeff" in text:
            table.wrong(line)
        elif line == 1:
            for name, _, kind in (described.rpartition(":") for described in text.split("\t")):
                good = name and name == name.strip() and kind in {"token", "token_seq", "float", "float_seq"}
                if not good or name in names:
                    table.wrong(1)
                names.append(name)
                table.kinds[name] = kind
        elif text and len(text.split("\t")) != len(names):
            table.wrong(line)
        elif text:
            table.rows.append((line, dict(zip(names, text.split("\t"), strict=True))))
    if ("inter", 1) in table.faults or ("item", 1) in table.faults:
        table.kinds = {}  # rows cannot be checked if the header is wrong
    return table


def check_header(table: Table, rules: Sequence[Rule]) -> None:
    """Check that the columns that are read exist and have the declared types."""
    wanted = [("user_id", {"token"}), ("item_id", {"token"}), ("timestamp", {"float"})]
    read = [rule for rule in rules if "column" in rule]
    wanted += [(rule["column"], {"token", "token_seq"} if "any_of" in rule else {"float"}) for rule in read]
    for name, kinds in wanted:
        if table.kinds.get(name) not in kinds:
            table.wrong(1)
    if (table.ending, 1) in table.faults:
        table.kinds = {}


def read_titles(table: Table) -> dict[str, str]:
    """Return each item's title; the first one if an item is listed twice."""
    if not table.kinds:
        return {}
    if table.kinds.get("item_id") != "token":
        table.wrong(1)
        return {}
    titled = [name for name in table.kinds if name != "item_id" and ("title" in name or "name" in name)]
    titles: dict[str, str] = {}
    for line, row in table.rows:
        token = row["item_id"]
        if wrong_identifier(token):
            table.wrong(line)
        title = row[titled[0]] if titled else ""
        titles.setdefault(token, title if title.strip() else token)
    return titles


def applies(rule: Rule, row: Mapping[str, str], table: Table, line: int) -> bool:
    if "column" not in rule:
        return True
    text = row[rule["column"]]
    if "any_of" in rule:
        if table.kinds[rule["column"]] == "token":
            if text != text.strip():
                table.wrong(line)
            return text in rule["any_of"]
        return any(word in rule["any_of"] for word in text.split(" "))
    value = number(text)
    if value is None:
        table.wrong(line)
        return True
    return bool(value >= rule["at_least"] if "at_least" in rule else value <= rule["at_most"])


def same_id(table: Table, ids: Mapping[str, int]) -> None:
    if len(set(ids.values())) != len(ids):
        table.wrong(None)


def number(text: str) -> float | None:
    """Return a plain decimal number, with or without an exponent; None for anything else or if it is too large."""
    text = text.strip(" ")
    mantissa, exponent = text, "0"
    for letter in "eE":
        if letter in text:
            mantissa, exponent = text.split(letter, 1)
            break
    whole, _, fraction = unsigned(mantissa).partition(".")
    exponent = unsigned(exponent)
    if not (whole + fraction) or not set(whole + fraction) <= DIGITS or not exponent or not set(exponent) <= DIGITS:
        return None
    value = float(text)
    return None if value in {float("inf"), float("-inf")} else value


def unsigned(text: str) -> str:
    return text[1:] if text[:1] in {"+", "-"} else text


def wrong_identifier(token: str) -> bool:
    """Return whether an identifier is empty, padded, or a number in the form of a spreadsheet or data frame."""
    if not token or token != token.strip():
        return True
    if number(token) is not None:
        body = unsigned(token)
        whole, dot, fraction = body.partition(".")
        if dot and whole and not fraction.strip("0"):  # 17.0 and 17.
            return True
        if dot and whole and ("e" in body or "E" in body):  # 1.7E+09
            return True
    groups = token.split(",")  # 1,234
    return (
        len(groups) > 1
        and set("".join(groups)) <= DIGITS
        and 1 <= len(groups[0]) <= 3
        and {*map(len, groups[1:])} == {3}
    )


def token_id(token: str) -> int:
    """Return the number of a token with up to 19 digits; else 63 bits of its hash."""
    if token and set(token) <= DIGITS and len(token) <= 19:
        return int(token)
    return int(hashlib.blake2b(token.encode(), digest_size=8).hexdigest(), 16) % 2**63
