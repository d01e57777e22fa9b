"""Conversion of published logs to atomic files with their own actions.

Logs list single signs (opened, then liked, then saved). All signs of one user on one pin in one sitting become one
interaction with all labels; a sitting continues while each sign follows the last within `SITTING_S`. The interaction
has the time of its last sign, so that no part of it enters a history before it was known.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ranker.data.adapters.source_table import UNREADABLE
from ranker.data.schema import FILE, ActionRule, ActionSchema, write_schema
from ranker.errors import DatasetError

#: The usual limit of a web session. In DeskDrop, 99.9% of the shorter gaps lie within one session that the portal
#: logged, but only 10% of the gaps above six hours.
SITTING_S = 30 * 60


@dataclass(frozen=True, slots=True)
class Signs:
    """Single signs, in any order.

    Attributes:
        users: identifiers.
        pins: identifiers.
        time_ms: int64[E].
        names: names of the S kinds of sign.
        shown: bool[E, S], the signs of each entry.
    """

    users: Sequence[str]
    pins: Sequence[str]
    time_ms: np.ndarray
    names: tuple[str, ...]
    shown: np.ndarray


@dataclass(frozen=True, slots=True)
class Items:
    """What a source says about pins.

    Attributes:
        columns: names and types, as in the header of an `.item` file; the first is `item_id:token`.
        rows: one tuple of texts per pin.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Reads one published log; `items` reads what the same source says about pins, where it says something."""

    name: str
    read: Callable[[Path], Signs]
    schema: ActionSchema
    items: Callable[[Path], Items] | None = None


def convert(adapter: Adapter, source: Path, folder: Path) -> int:
    """Write atomic files and their `actions.toml` to a new folder; return the number of interactions.

    Raises:
        DatasetError: the source is not the log that the adapter reads, or the folder exists.
    """
    if folder.exists():
        raise DatasetError(f"{folder} already exists; choose a new folder")
    try:
        merged = one_per_sitting(adapter.read(source))
        items = None if adapter.items is None else adapter.items(source)
    except UNREADABLE as error:
        raise DatasetError(f"{source} is not the {adapter.name} log that this command reads: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        with (staging / f"{adapter.name}.inter").open("w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id:token\ttimestamp:float\tsigns:token_seq\n")
            for user, pin, time_ms, shown in zip(
                merged.users, merged.pins, merged.time_ms.tolist(), merged.shown, strict=True
            ):
                signs = " ".join(name for name, on in zip(merged.names, shown.tolist(), strict=True) if on)
                file.write(f"{user}\t{pin}\t{time_ms / 1000:.3f}\t{signs}\n")
        if items is not None:
            lines = ["\t".join(row) + "\n" for row in (items.columns, *items.rows)]
            (staging / f"{adapter.name}.item").write_text("".join(lines), encoding="utf-8")
        write_schema(staging / FILE, adapter.schema)
        staging.rename(folder)
    return len(merged.users)


def one_per_sitting(signs: Signs) -> Signs:
    """Merge the signs of each user on each pin in one sitting; return them in order of time."""
    if not len(signs.users):
        return signs
    user_ids, user = np.unique(np.asarray(signs.users), return_inverse=True)
    pin_ids, pin = np.unique(np.asarray(signs.pins), return_inverse=True)
    order = np.lexsort((signs.time_ms, pin, user))
    user, pin, time_ms = user[order], pin[order], signs.time_ms[order]
    new = (np.diff(user) != 0) | (np.diff(pin) != 0) | (np.diff(time_ms) > SITTING_S * 1000)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    last = np.concatenate([starts[1:], [len(order)]]) - 1
    by_time = np.argsort(time_ms[last], kind="stable")
    last = last[by_time]
    return Signs(
        user_ids[user[last]].tolist(),
        pin_ids[pin[last]].tolist(),
        time_ms[last],
        signs.names,
        np.logical_or.reduceat(signs.shown[order], starts)[by_time],
    )


def sign_rule(name: str, meaning: str, sign: str | None, affinity: float, *, head: bool = True) -> ActionRule:
    """Return the rule of an action that one sign means; without a sign, every interaction is one."""
    if sign is None:
        return ActionRule(name=name, meaning=meaning, affinity=affinity, head=head)
    return ActionRule(name=name, meaning=meaning, column="signs", any_of=(sign,), affinity=affinity, head=head)
