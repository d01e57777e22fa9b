"""Grocery: Amazon's reviews of groceries until July 2014, in the form of ReChorus: a folder of two tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ranker.data.adapters.conversion import Adapter, Items, Signs, sign_rule
from ranker.data.adapters.source_table import Row, read_table
from ranker.data.schema import ActionSchema

_EVENTS, _ITEMS = "train.csv", "item_meta.csv"
_LIST = re.compile(r"\[(?:[0-9]+(?:, ?[0-9]+)*)?\]")


def _events(source: Path) -> Signs:
    rows = read_table(_inside(source, _EVENTS), "\t", ("user_id", "item_id", "time"))
    return Signs(
        users=[row.identifier("user_id") for row in rows],
        pins=[row.identifier("item_id") for row in rows],
        time_ms=np.array([row.time_ms("time", 1000) for row in rows], np.int64),
        names=("review",),
        shown=np.ones((len(rows), 1), bool),
    )


def _items(source: Path) -> Items:
    rows = read_table(_inside(source, _ITEMS), "\t", ("item_id", "i_category", "r_complement", "r_substitute"))
    return Items(
        ("item_id:token", "category:token", "complements:token_seq", "substitutes:token_seq"),
        [
            (
                row.identifier("item_id"),
                row.identifier("i_category"),
                _listed(row, "r_complement"),
                _listed(row, "r_substitute"),
            )
            for row in rows
        ],
    )


def _listed(row: Row, column: str) -> str:
    if not _LIST.fullmatch(row[column]):
        raise row.fault(column, "it must be a list of items such as [4, 17]")
    return " ".join(re.findall("[0-9]+", row[column]))


def _inside(source: Path, name: str) -> Path:
    if not source.is_dir():
        raise ValueError(f"it must be a folder with {_EVENTS} and {_ITEMS}")
    if not (source / name).is_file():
        raise ValueError(f"it has no file {name}")
    return source / name


#: Reviews, which stand for purchases. Times are whole days. There is one kind of action, so a model has one head.
GROCERY = Adapter(
    "grocery",
    _events,
    ActionSchema(actions=(sign_rule("review", "bought, and reviewed", None, 1.0),)),
    _items,
)
