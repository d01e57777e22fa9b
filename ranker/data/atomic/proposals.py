"""Proposes the TOML files that a dataset lacks: which columns could be features, and which tell actions apart."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ranker.data.atomic.described import FILE as FEATURES
from ranker.data.atomic.described import WORDS_MAX, Column, Vectors
from ranker.data.atomic.recbole_file import AtomicFile, open_atomic
from ranker.data.atomic.vectors import ENDING, open_vectors
from ranker.data.schema import FILE as ACTIONS
from ranker.data.schema import NAME_LENGTH_MAX
from ranker.errors import DatasetError

#: The most frequent words of a column that are proposed, of those that this share of the rows has.
_WORDS_EACH, _SHARE_MIN = 32, 0.005
#: A column with more different values tells no actions apart.
_ACTIONS_MAX = 30
#: Parts of words that speak against a pin.
_AGAINST = ("hide", "dislike", "hate", "skip", "block", "report", "unfollow", "unlike", "negative", "remove")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A file that the folder lacks, and its content."""

    name: str
    why: str
    text: str


def proposals(folder: Path) -> list[Proposal]:
    """Return a proposal for each TOML file that a folder of atomic files lacks and could use."""
    found: list[Proposal] = []
    if not (folder / ACTIONS).exists():
        found += [made for path in sorted(folder.glob("*.inter"))[:1] if (made := _actions(open_atomic(path)))]
    if not (folder / FEATURES).exists() and (made := _features(folder)):
        found.append(made)
    return found


def _actions(file: AtomicFile) -> Proposal | None:
    """Propose an action for each word of a column that names what happened, the rarest first."""
    if "rating" in file.kinds:
        return None
    for name, kind in file.kinds.items():
        if kind not in {"token", "token_seq"} or name in {"user_id", "item_id"}:
            continue
        counts = _words(file, name, several=kind == "token_seq")
        if not 2 <= len(counts) <= _ACTIONS_MAX:
            continue
        words = sorted(counts, key=lambda word: (counts[word], word))
        names = _names(words)
        tables = []
        for place, word in enumerate(words):
            against = any(part in word.lower() for part in _AGAINST)
            affinity = 0.0 if against else round(1.0 - 0.7 * place / max(1, len(words) - 1), 2)
            tables.append(
                f"[[actions]]\nname = {json.dumps(names[place])}\nmeaning = {_toml(f'{name} is {word}')}\n"
                f"column = {_toml(name)}\nany_of = [{_toml(word)}]\naffinity = {affinity}  # {counts[word]:,} times\n"
            )
        intro = (
            "# Proposed from how often each word occurs: the rarest first, as rare actions are mostly strong ones.\n"
            "# Order them by strength. Affinity, 0 to 1: how much an action says that user and pin belong together.\n"
        )
        return Proposal(ACTIONS, f"the words of column {name!r} could be actions", intro + "\n" + "\n".join(tables))
    return None


def _names(words: list[str]) -> list[str]:
    """Return a name of an action for each word, each different."""
    found: list[str] = []
    for place, word in enumerate(words):
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in word.lower())
        name = plain.strip("_")[: NAME_LENGTH_MAX - 4] or "action"
        name = name if name[0].isalpha() else f"a_{name}"
        found.append(name if name not in found else f"{name}_{place}")
    return found


def _features(folder: Path) -> Proposal | None:
    """Propose the columns of numbers, and those of few words, of the files about pins and users; and all vectors."""
    vectors, left_out = _vectors(folder)
    tables: list[str] = []
    of_vectors = bool(left_out)
    for ending, key in (("*.item", "pins"), ("*.user", "users")):
        words_left = WORDS_MAX - sum(found.dim or 0 for found in vectors[key])
        for path in sorted(folder.glob(ending))[:1]:
            columns, others = _columns(open_atomic(path), key, words_left)
            tables += columns
            left_out += others
        tables += [f"[[{key}]]\nvectors = {_toml(found.vectors)}  # of {found.dim} numbers\n" for found in vectors[key]]
    if not tables and not of_vectors:
        return None
    intro = "# What becomes features of pins and users. Remove what a server cannot know when it ranks.\n"
    text = "\n".join([intro, *tables, *left_out]).rstrip() + "\n"
    return Proposal(FEATURES, "what the data says about pins and users could be features", text)


def _columns(file: AtomicFile, key: str, words_left: int) -> tuple[list[str], list[str]]:
    """Return a table for each column of a file that could be a feature, and a comment for each other one."""
    tables: list[str] = []
    left_out: list[str] = []
    for name, kind in file.kinds.items():
        if name in {"user_id", "item_id"} or (key == "pins" and ("title" in name or "name" in name)):
            continue
        column, why_not = _column(file, name, kind, words_left)
        if column is None:
            left_out.append(f"# {file.path.name}, {name}: {why_not}")
            continue
        words_left -= len(column.words or ())
        lines = [f"[[{key}]]", f"column = {_toml(name)}"]
        if column.words is not None:
            lines.append(f"words = [{', '.join(map(_toml, column.words))}]")
        tables.append("\n".join(lines) + "\n")
    return tables, left_out


def _vectors(folder: Path) -> tuple[dict[str, list[Vectors]], list[str]]:
    """Return the files of vectors of pins and of users, and a comment for each other Parquet file."""
    found: dict[str, list[Vectors]] = {"pins": [], "users": []}
    left_out: list[str] = []
    for path in sorted(folder.glob(f"*{ENDING}")):
        try:
            file = open_vectors(path)
            feature, tokens, _ = file.read(Vectors(vectors=path.name))
            key = {"item_id": "pins", "user_id": "users"}.get(file.id_column) or _side(folder, tokens)
            if sum(other.dim or 0 for other in found[key]) + (feature.dim or 0) > WORDS_MAX:
                raise DatasetError(f"with it, {key} would have more than {WORDS_MAX} numbers of vectors")
            found[key].append(feature)
        except DatasetError as error:
            reason = str(error).replace(str(path), path.name)  # the folder may move
            left_out.append(f"# {reason}" if reason.startswith(path.name) else f"# {path.name}: {reason}")
    return found, left_out


def _side(folder: Path, tokens: list[str]) -> str:
    """Return whether identifiers are those of pins or of users. Raises DatasetError if that cannot be said."""
    held = set(tokens)
    for path in sorted(folder.glob("*.inter"))[:1]:
        rows = open_atomic(path).read(("item_id", "user_id"))
        sides = {"pins": "item_id", "users": "user_id"}
        fitting = [key for key, name in sides.items() if not held.isdisjoint(rows.encoded(name)[0])]
        if len(fitting) == 1:
            return fitting[0]
        which = "both pins and users" if fitting else "neither pins nor users"
        raise DatasetError(f"its identifiers are those of {which}; name their column item_id or user_id")
    raise DatasetError("there is no NAME.inter to compare its identifiers with")


def _column(file: AtomicFile, name: str, kind: str, words_left: int) -> tuple[Column | None, str]:
    """Return a column as a feature, or why it could be none."""
    if kind == "float":
        try:
            numbers = file.read((name,)).numbers(name)
        except DatasetError as error:
            return None, str(error)
        return (Column(column=name), "") if len(numbers) and np.ptp(numbers) > 0 else (None, "it is always the same")
    if kind not in {"token", "token_seq"}:
        return None, f"a {kind} cannot be a feature"
    counts = _words(file, name, several=kind == "token_seq")
    rows = len(file.read((name,)))
    often = [word for word, count in counts.most_common(_WORDS_EACH) if count >= _SHARE_MIN * rows and word]
    covered = sum(counts[word] for word in often) / max(1, sum(counts.values()))
    if len(counts) < 2 or covered < 0.5 or not often[:words_left]:
        return None, f"{len(counts):,} different values, of which the frequent ones cover {covered:.0%}"
    return Column(column=name, words=tuple(often[:words_left])), ""


def _words(file: AtomicFile, name: str, *, several: bool) -> Counter[str]:
    values, code = file.read((name,)).encoded(name)
    counts: Counter[str] = Counter()
    for value, count in zip(values, np.bincount(code, minlength=len(values)).tolist(), strict=True):
        for word in value.split(" ") if several else [value]:
            if word:
                counts[word] += count
    return counts


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
