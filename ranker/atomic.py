"""Reading datasets in RecBole's atomic format: tab-separated files whose header says `name:type`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.types

from ranker.errors import DatasetError
from ranker.schema import CLOSEUPS, FILE, RATINGS, ActionSchema, Tokens, read_schema

# The two kinds of text get two Arrow types, so that a column still knows which it is.
_TYPES = {"token": pa.string(), "token_seq": pa.large_string(), "float": pa.float64(), "float_seq": pa.string()}
_DIGITS_MAX = 19  # every unsigned integer of 19 digits fits 64 bits


@dataclass(frozen=True, slots=True)
class AtomicDataset:
    """Interactions as columns, oldest first; those of one time stand in file order.

    Attributes:
        name: the files' common name.
        sha256: of the `.inter` file.
        users: uint64[E].
        pins: uint64[E].
        time_ms: int64[E], Unix time in milliseconds.
        schema: which actions there are.
        labels: bool[E, A], which interactions are which actions of the schema.
        titles: a title for every pin of the `.item` file and of the interactions.
        tokens: the same pins' identifiers as they stand in the files.
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


def read_atomic(folder: Path, schema: ActionSchema | None = None) -> AtomicDataset:
    """Read `NAME.inter` and, where they exist, `NAME.item` and `actions.toml` from a folder.

    Args:
        folder: of one dataset.
        schema: which interactions are which actions. None takes the folder's `actions.toml`; without that file, a
            `rating` column gives saves, likes, hides and closeups, and without one everything is a closeup.

    Raises:
        DatasetError: a file or column is missing or unreadable, or two identifiers share a hash.
        SettingError: `actions.toml` is unusable.

    Cost: about a second per million interactions; Python work per distinct identifier only.
    """
    path = _interaction_file(folder)
    table = _read_table(path)
    for column in ("user_id", "item_id", "timestamp"):
        _column(table, path, column)
    users, _ = _ids(table["user_id"], "user")
    pins, tokens = _ids(table["item_id"], "item")
    time_ms = np.round(_numbers(table["timestamp"], path, "timestamp") * 1000).astype(np.int64)
    schema = schema or _own_schema(folder, table)
    labels = _labels(schema, table, path, len(users))
    order = np.argsort(time_ms, kind="stable")
    titles, item_tokens = _read_titles(path.with_suffix(".item"))
    tokens = _merged(tokens, item_tokens)
    return AtomicDataset(
        name=path.stem,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        users=users[order],
        pins=pins[order],
        time_ms=time_ms[order],
        schema=schema,
        labels=labels[order],
        titles={**tokens, **titles},
        tokens=tokens,
    )


def token_id(token: str) -> int:
    """Return a token's 64-bit id: the number it spells, or the low 63 bits of its 8-byte BLAKE2b hash."""
    if token.isascii() and token.isdigit() and len(token) <= _DIGITS_MAX:
        return int(token)
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "big") & ((1 << 63) - 1)


def distinct_ids(tokens: Sequence[str], what: str) -> np.ndarray:
    """Return uint64[N], the ids of N distinct tokens. Raises DatasetError when two of them share an id."""
    ids = np.array([token_id(token) for token in tokens], np.uint64)
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(same):
        first, second = (tokens[int(i)] for i in order[same[0] : same[0] + 2])
        raise DatasetError(f"{what} identifiers {first!r} and {second!r} have the same id; rename one of them")
    return ids


def _interaction_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise DatasetError(f"no dataset folder at {folder}; it must hold NAME.inter, and may hold NAME.item")
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        held = ", ".join(p.name for p in found) or ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DatasetError(f"{folder} must hold exactly one NAME.inter file; it holds {held}")
    return found[0]


def _own_schema(folder: Path, table: Mapping[str, pa.ChunkedArray]) -> ActionSchema:
    if (folder / FILE).exists():
        return read_schema(folder / FILE)
    return RATINGS if "rating" in table else CLOSEUPS


def _labels(schema: ActionSchema, table: Mapping[str, pa.ChunkedArray], path: Path, count: int) -> np.ndarray:
    columns: dict[str, np.ndarray | Tokens] = {}
    for name in schema.columns:
        if name not in table:
            raise DatasetError(f"{path}: the actions read column {name!r}; it has {', '.join(table)}")
        numeric = pyarrow.types.is_floating(table[name].type)
        columns[name] = _numbers(table[name], path, name).astype(np.float32) if numeric else _tokens(table[name])
    try:
        return schema.labels(columns, count)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def _tokens(column: pa.ChunkedArray) -> Tokens:
    several = pyarrow.types.is_large_string(column.type)
    encoded = column.combine_chunks().dictionary_encode()
    sets = tuple(frozenset(v.split(" ") if several else [v]) for v in encoded.dictionary.to_pylist())
    return Tokens(sets, np.asarray(encoded.indices))


def _read_table(path: Path) -> dict[str, pa.ChunkedArray]:
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().rstrip("\r\n").split("\t")
        types = dict(field.rpartition(":")[::2] for field in header)
        unknown = sorted({kind for kind in types.values() if kind not in _TYPES} | ({""} if "" in types else set()))
        if unknown:
            raise DatasetError(
                f"{path}: the header must name each column as name:type with type {', '.join(_TYPES)}; got {header}"
            )
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={f"{name}:{kind}": _TYPES[kind] for name, kind in types.items()}, strings_can_be_null=False
            ),
        )
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DatasetError(f"cannot read {path}: {error}") from error
    return {name: table[i] for i, name in enumerate(types)}


def _column(table: Mapping[str, pa.ChunkedArray], path: Path, name: str) -> pa.ChunkedArray:
    if name not in table:
        raise DatasetError(f"{path}: no column {name!r}; it has {', '.join(table)}. Rename the one that means it")
    return table[name]


def _ids(column: pa.ChunkedArray, what: str) -> tuple[np.ndarray, dict[int, str]]:
    encoded = column.combine_chunks().dictionary_encode()
    tokens = encoded.dictionary.to_pylist()
    ids = distinct_ids(tokens, what)
    return ids[np.asarray(encoded.indices)], dict(zip(ids.tolist(), tokens, strict=True))


def _numbers(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    if not pyarrow.types.is_floating(column.type):
        raise DatasetError(f"{path}: column {name!r} must be declared {name}:float")
    values = column.to_numpy()
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DatasetError(f"{path}, line {row + 2}: column {name!r} is empty or no number")
    return np.asarray(values, np.float64)


def _read_titles(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return pin id -> title and pin id -> token, both empty when there is no such file."""
    if not path.exists():
        return {}, {}
    table = _read_table(path)
    ids = _column(table, path, "item_id").to_pylist()
    titled = [name for name in table if name != "item_id" and ("title" in name or "name" in name)]
    titles = table[titled[0]].to_pylist() if titled else ids
    tokens = dict(zip(distinct_ids(ids, "item").tolist(), ids, strict=True))
    return dict(zip(tokens, map(str, titles), strict=True)), tokens


def _merged(tokens: dict[int, str], item_tokens: dict[int, str]) -> dict[int, str]:
    for pin_id, token in item_tokens.items():
        if tokens.get(pin_id, token) != token:
            raise DatasetError(f"item identifiers {token!r} and {tokens[pin_id]!r} have the same id; rename one")
    return {**item_tokens, **tokens}
