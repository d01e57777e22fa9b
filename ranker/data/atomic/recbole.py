"""Reads datasets in RecBole's atomic format: `NAME.inter`, with optional `NAME.item`, `NAME.user` and TOML files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from feature_client.action_times import EARLIEST_MS
from ranker.data.atomic.described import FILE as FEATURES
from ranker.data.atomic.described import (
    Column,
    Described,
    Values,
    check_columns,
    columns_of,
    numbers_of,
    read_described,
)
from ranker.data.atomic.identifiers import MISSING, distinct_ids, misspelt
from ranker.data.atomic.recbole_file import BLOCK_BYTES, AtomicFile, TextRows, open_atomic
from ranker.data.atomic.vectors import unnamed_vectors, with_vectors
from ranker.data.problems import LATEST_MS, Problem
from ranker.data.schema import CLOSEUPS, FILE, RATINGS, RATINGS_MAX, ActionSchema, Columns, Tokens, read_schema
from ranker.errors import DatasetError, SettingError

_EARLIEST_S, _LATEST_S = EARLIEST_MS / 1e3, LATEST_MS / 1e3
#: Units per second, to recognise timestamps in another unit.
_UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}


@dataclass(frozen=True, slots=True)
class AtomicDataset:
    """Interactions as columns, oldest first; interactions of equal time are in file order.

    Attributes:
        name: common name of the files.
        sha256: digest of the `.inter` file and, where there are any, of the files of vectors.
        users: uint64[E].
        pins: uint64[E].
        time_ms: int64[E], Unix time in milliseconds.
        schema: the actions.
        labels: bool[E, A], the actions of each interaction.
        titles: a title for every pin of the `.item` file and of the interactions.
        tokens: the identifiers of the same pins, as in the files.
        described: the columns and vectors that become features.
        pin_values: features of the pins of the `.item` file and of the vectors.
        user_values: features of the users of the `.user` file and of the vectors.
        unread: columns that are not used, by file name.
        problems: problems of the files.
    """

    name: str
    sha256: str
    users: np.ndarray
    pins: np.ndarray
    time_ms: np.ndarray
    schema: ActionSchema
    labels: np.ndarray
    titles: Mapping[int, str]
    tokens: Mapping[int, str]
    described: Described = field(default_factory=Described)
    pin_values: Values = field(default_factory=Values.none)
    user_values: Values = field(default_factory=Values.none)
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def read_atomic(folder: Path, schema: ActionSchema | None = None, *, block_bytes: int = BLOCK_BYTES) -> AtomicDataset:
    """Read `NAME.inter` and, where they exist, `NAME.item`, `NAME.user`, the TOML files, and the vectors they name.

    Args:
        folder: folder of one dataset.
        schema: the actions. None reads `actions.toml` in the folder; without that file, a `rating` column gives saves,
            likes, hides and closeups, and without a `rating` column every interaction is a closeup.
        block_bytes: size of the blocks in which files are parsed.

    Raises:
        DatasetError: a file, column or value is missing or malformed, or two identifiers share an id. The message
            names file, line and column.
        SettingError: `actions.toml` or `features.toml` is invalid.

    Cost: about a second per million interactions; Python work per distinct identifier only.
    """
    file = open_atomic(_interaction_file(folder), block_bytes)
    given = schema or _own_schema(folder)
    schema = given or (RATINGS if "rating" in file.kinds else CLOSEUPS)
    _check_columns(file, schema)
    read = ("user_id", "item_id", "timestamp", *schema.columns)
    rows = file.read(read)
    users, user_tokens, user_problems = _identifiers(rows, "user_id")
    pins, pin_tokens, pin_problems = _identifiers(rows, "item_id")
    time_ms = _times_ms(rows)
    labels, label_problems = _labels(schema, rows, rated=given is None)
    user_ids = distinct_ids(user_tokens, "user")
    described = read_described(folder / FEATURES) if (folder / FEATURES).exists() else Described()
    columns, of_users = columns_of(described.pins), columns_of(described.users)
    items = _read_listed(file.path.with_suffix(".item"), "item", columns, pin_tokens, block_bytes)
    about_users = _read_listed(file.path.with_suffix(".user"), "user", of_users, user_tokens, block_bytes)
    own_pins = with_vectors(folder, "item", described.pins, _values(items, "item"), pin_tokens)
    own_users = with_vectors(folder, "user", described.users, _values(about_users, "user"), user_tokens)
    tokens = list(dict.fromkeys([*pin_tokens, *items.titles]))
    pin_ids = distinct_ids(tokens, "item")
    order = np.argsort(time_ms, kind="stable")
    return AtomicDataset(
        name=file.path.stem,
        sha256=_digest(file.content, (*own_pins.digests, *own_users.digests)),
        users=user_ids[users][order],
        pins=pin_ids[pins][order],
        time_ms=time_ms[order],
        schema=schema,
        labels=labels[order],
        titles=dict(zip(pin_ids.tolist(), (items.titles.get(token, token) for token in tokens), strict=True)),
        tokens=dict(zip(pin_ids.tolist(), tokens, strict=True)),
        described=Described(pins=own_pins.features, users=own_users.features),
        pin_values=own_pins.values,
        user_values=own_users.values,
        unread={
            file.path.name: tuple(name for name in file.kinds if name not in read),
            **items.unread,
            **about_users.unread,
            **own_pins.unread,
            **own_users.unread,
        },
        problems=(
            *_blank_lines(file),
            *user_problems,
            *pin_problems,
            *label_problems,
            *items.problems,
            *about_users.problems,
            *own_pins.problems,
            *own_users.problems,
            *unnamed_vectors(folder, (*described.pins, *described.users)),
        ),
    )


def _digest(content: bytes, of_vectors: Sequence[str]) -> str:
    """Return the digest of the `.inter` file, or of its digest and those of the vectors."""
    digest = hashlib.sha256(content).hexdigest()
    return hashlib.sha256("\n".join([digest, *of_vectors]).encode()).hexdigest() if of_vectors else digest


def _interaction_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise DatasetError(f"there is no dataset folder {folder}; it must contain NAME.inter and may contain NAME.item")
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        held = ", ".join(p.name for p in found) or ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        packed = next((p.name for p in sorted(folder.glob("*.inter.*"))), None)
        hint = f"; unpack {packed}" if packed and not found else ""
        raise DatasetError(f"{folder} must contain exactly one NAME.inter file, but contains {held}{hint}")
    return found[0]


def _own_schema(folder: Path) -> ActionSchema | None:
    return read_schema(folder / FILE) if (folder / FILE).exists() else None


def _check_columns(file: AtomicFile, schema: ActionSchema) -> None:
    for name, kind in (("user_id", "token"), ("item_id", "token"), ("timestamp", "float")):
        file.require(name, (kind,))
    for rule in schema.actions:
        if rule.column is None:
            continue
        if rule.column not in file.kinds:
            raise file.fault(1, f"the actions need column {rule.column!r}, but the columns are {', '.join(file.kinds)}")
        kind = file.kinds[rule.column]
        if rule.any_of is None and kind != "float":
            raise file.fault(
                1,
                f"action {rule.name!r} compares column {rule.column!r} with a number, but it is a {kind}; "
                f"declare it {rule.column}:float, or use any_of",
            )
        if rule.any_of is not None and kind not in {"token", "token_seq"}:
            raise file.fault(
                1,
                f"action {rule.name!r} looks for tokens in column {rule.column!r}, but it is a {kind}; "
                f"declare it {rule.column}:token, or use at_least or at_most",
            )


def _identifiers(rows: TextRows, name: str) -> tuple[np.ndarray, list[str], list[Problem]]:
    """Return int64[E] positions in the distinct tokens, these tokens, and their problems."""
    tokens, code = rows.encoded(name)
    for position, token in enumerate(tokens):
        if (wrong := misspelt(token)) is not None:
            raise rows.fault(int(np.argmax(code == position)), name, f"the identifier {wrong}")
    return code, tokens, list(_suspicious(rows, name, tokens, code))


def _suspicious(rows: TextRows, name: str, tokens: list[str], code: np.ndarray) -> Iterator[Problem]:
    where = rows.file.path.name
    missing = [position for position, token in enumerate(tokens) if token.lower() in MISSING]
    if missing:
        count = int(np.isin(code, missing).sum())
        line = rows.file.line_of(int(np.argmax(code == missing[0])))
        yield Problem(
            "warning",
            f"{where}: {count:,} lines have {name} {tokens[missing[0]]!r}, the first of them line {line}",
            "if this means a missing value, remove these lines; together they form a single user or item",
        )
    if tokens and all(len(token) > 1 and token[0] == token[-1] == '"' for token in tokens):
        yield Problem(
            "warning",
            f"{where}: every {name} is in quotes, and the quotes are part of the identifier",
            "write the file without quotes, or include the quotes in requests",
        )


def _times_ms(rows: TextRows) -> np.ndarray:
    """Return int64[E], Unix time in milliseconds, rounded half to even."""
    seconds = rows.numbers("timestamp")
    wrong = np.flatnonzero(~((seconds >= 0) & (seconds < _LATEST_S)))
    if len(wrong):
        raise rows.fault(int(wrong[0]), "timestamp", _wrong_time(float(seconds[wrong[0]])))
    return np.round(seconds * 1000).astype(np.int64)


def _wrong_time(seconds: float) -> str:
    for unit, per_second in _UNITS.items():
        if _EARLIEST_S <= seconds / per_second < _LATEST_S:
            return f"timestamps are Unix times in seconds, but this one looks like {unit}; divide by {per_second:,.0f}"
    side = "before 1970" if seconds < 0 else "after the year 2200"
    return f"as a Unix time in seconds it lies {side}; correct it, or remove the line"


def _labels(schema: ActionSchema, rows: TextRows, *, rated: bool) -> tuple[np.ndarray, list[Problem]]:
    """Return bool[E, A], and the problems of the actions."""
    columns: dict[str, np.ndarray | Tokens] = {}
    for name in schema.columns:
        kind = rows.file.kinds[name]
        columns[name] = rows.numbers(name) if kind == "float" else _tokens(rows, name, several=kind == "token_seq")
    if rated and schema is RATINGS:
        _check_scale(rows, columns["rating"])
    labels = schema.labels(columns, len(rows))
    without = np.flatnonzero(~labels.any(axis=1))
    if len(without):
        raise rows.file.fault(
            rows.file.line_of(int(without[0])),
            f"this interaction and {len(without) - 1:,} others of {len(rows):,} match none of the actions "
            f"{', '.join(schema.names)}; if these pins were only shown, add a last action without a column, "
            'such as name = "shown", meaning = "was shown", affinity = 0.0, head = false',
        )
    return labels, list(_words_not_there(schema, columns))


def _words_not_there(schema: ActionSchema, columns: Columns) -> Iterator[Problem]:
    """Name misspelt words. If all words of an action are missing, another problem reports the missing action."""
    for rule in schema.actions:
        column = columns.get(rule.column or "")
        if rule.any_of is None or not isinstance(column, Tokens):
            continue
        words = frozenset().union(*column.sets)
        lacking = [word for word in rule.any_of if word not in words]
        if lacking and len(lacking) < len(rule.any_of):
            yield Problem(
                "warning",
                f"action {rule.name!r}: no line has {', '.join(map(repr, lacking))} in column {rule.column!r}",
                f"check the spelling; the column contains {', '.join(sorted(words - {''})[:8])}",
            )


def _check_scale(rows: TextRows, ratings: np.ndarray | Tokens) -> None:
    wrong = np.flatnonzero((np.asarray(ratings) < 0) | (np.asarray(ratings) > RATINGS_MAX))
    if len(wrong):
        raise rows.fault(
            int(wrong[0]),
            "rating",
            f"without {FILE}, ratings are on a scale from 1 to {RATINGS_MAX} (5 is a save, 4 a like, 2 a hide); "
            f"define the actions of another scale in {FILE}",
        )


def _tokens(rows: TextRows, name: str, *, several: bool) -> Tokens:
    values, code = rows.encoded(name)
    for position, value in enumerate(values):
        if not several and value != value.strip():
            row = int(np.argmax(code == position))
            raise rows.fault(row, name, "it starts or ends with a blank, so no any_of can match it; remove the blank")
    return Tokens(tuple(frozenset(value.split(" ") if several else [value]) for value in values), code)


@dataclass(frozen=True, slots=True)
class _Listed:
    """The contents of an `.item` or `.user` file, with titles and features by token, in the order of `titles`."""

    titles: Mapping[str, str]
    numbers: np.ndarray
    unread: Mapping[str, tuple[str, ...]]
    problems: tuple[Problem, ...]


def _without(path: Path, columns: Sequence[Column]) -> _Listed:
    if columns:
        raise SettingError(f"{FEATURES} reads column {columns[0].column!r} of {path.name}, which does not exist")
    return _Listed({}, np.empty((0, 0), np.float32), {}, ())


def _values(listed: _Listed, what: str) -> Values:
    ids = distinct_ids(list(listed.titles), what)
    order = np.argsort(ids)
    return Values(ids[order], listed.numbers[order])


def _read_listed(path: Path, what: str, columns: Sequence[Column], known: Sequence[str], block_bytes: int) -> _Listed:
    """Read what a file says about items or users; nothing if it does not exist. The first line of each counts.

    Args:
        path: the `.item` or `.user` file.
        what: `item` or `user`.
        columns: the columns that are features.
        known: the identifiers of the interactions.
        block_bytes: size of the blocks in which the file is parsed.
    """
    if not path.exists():
        return _without(path, columns)
    file, identifier = open_atomic(path, block_bytes), f"{what}_id"
    file.require(identifier, ("token",))
    check_columns(file, columns)
    names = [column.column for column in columns]
    titles = (name for name in file.kinds if name != identifier and ("title" in name or "name" in name))
    title = next(titles, identifier) if what == "item" else identifier
    rows = file.read((identifier, title, *names))
    code, tokens, problems = _identifiers(rows, identifier)
    first = np.unique(code, return_index=True)[1]
    texts = rows.texts[title].to_pylist()
    titled = {token: texts[row] if texts[row].strip() else token for token, row in zip(tokens, first, strict=True)}
    problems = [*_blank_lines(file), *problems, *_repeated(rows, what, code, tokens, first)]
    if known and titled and titled.keys().isdisjoint(known):
        problems.append(
            Problem(
                "warning",
                f"{path.name} has no {what} of the interactions: it has {next(iter(titled))!r}, they have {known[0]!r}",
                "write identifiers in the same way in both files",
            )
        )
    unread = tuple(name for name in file.kinds if name not in {identifier, title, *names})
    return _Listed(titled, numbers_of(rows, columns)[first], {path.name: unread}, tuple(problems))


def _repeated(rows: TextRows, what: str, code: np.ndarray, tokens: list[str], first: np.ndarray) -> Iterator[Problem]:
    again = np.setdiff1d(np.arange(len(code)), first)
    if len(again):
        token = tokens[code[again[0]]]
        lines = " and ".join(str(rows.file.line_of(int(row))) for row in (first[code[again[0]]], again[0]))
        yield Problem(
            "warning",
            f"{rows.file.path.name}: {len(np.unique(code[again])):,} {what}s are listed more than once, such as "
            f"{token!r} on lines {lines}; the first line of each {what} counts",
            f"list each {what} once",
        )


def _blank_lines(file: AtomicFile) -> Iterator[Problem]:
    count, first = file.blank_lines()
    if count:
        yield Problem(
            "warning",
            f"{file.path.name}: {count:,} blank lines were skipped, the first of them line {first}",
            "check that no data is missing there, and remove them",
        )
