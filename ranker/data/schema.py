"""What an interaction counts as: named actions, each a rule over one column of the dataset."""

from __future__ import annotations

import json
import keyword
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from feature_client.groups import Frozen, Name
from ranker.errors import DatasetError, SettingError

FILE = "actions.toml"
#: Feature groups have a field `<action>_share`, whose name may be as long as `Name` allows.
NAME_LENGTH_MAX = 40 - len("_share")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A column of tokens.

    Attributes:
        sets: each distinct value once, as the tokens that it holds: one, or several in a `token_seq` column.
        code: int[E] positions in `sets`.
    """

    sets: tuple[frozenset[str], ...]
    code: np.ndarray


Columns = Mapping[str, "np.ndarray | Tokens"]


class ActionRule(Frozen):
    """One action, and when an interaction is it; without a column every interaction is."""

    name: Annotated[Name, Field(max_length=NAME_LENGTH_MAX)]
    meaning: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] | None = None
    at_least: Annotated[float, Field(allow_inf_nan=False, strict=True)] | None = None
    at_most: Annotated[float, Field(allow_inf_nan=False, strict=True)] | None = None
    any_of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    #: How much the action says that user and pin belong together: 1 for the clearest sign, 0 for none or the opposite.
    affinity: Annotated[float, Field(ge=0, le=1, strict=True)]
    #: Whether networks predict it; an action without a head still stands in the sequence.
    head: Annotated[bool, Field(strict=True)] = True

    @field_validator("name")
    @classmethod
    def _fits_an_expression(cls, name: str) -> str:
        if keyword.iskeyword(name):
            raise ValueError(f"{name!r} means something else in a utility expression; choose another name")
        return name

    @model_validator(mode="after")
    def _one_condition(self) -> ActionRule:
        given = [c for c in ("at_least", "at_most", "any_of") if getattr(self, c) is not None]
        if self.column is None and given:
            raise ValueError(f"{given[0]} needs the column that it is about")
        if self.column is not None and len(given) != 1:
            raise ValueError(f"a column needs exactly one of at_least, at_most, any_of; it has {given or 'none'}")
        return self

    def applies(self, columns: Columns, count: int) -> np.ndarray:
        """Return bool[E], which of `count` interactions are this action; its column must fit."""
        if self.column is None:
            return np.ones(count, bool)
        column = columns[self.column]
        if isinstance(column, Tokens):
            wanted = frozenset(self.any_of or ())
            found = np.array([not wanted.isdisjoint(held) for held in column.sets], bool)
            return np.asarray(found[column.code])
        return np.asarray(column >= self.at_least if self.at_least is not None else column <= self.at_most)


class ActionSchema(Frozen):
    """A dataset's actions, strongest first: an interaction that is several stands in the sequence as the first."""

    actions: Annotated[tuple[ActionRule, ...], Field(min_length=1, max_length=254)]

    @model_validator(mode="after")
    def _coherent(self) -> ActionSchema:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"action names repeat: {', '.join(self.names)}")
        if not self.heads:
            raise ValueError("every action has head = false: nothing is left to predict")
        if not self.affinities.any():
            raise ValueError("every action has affinity 0: nothing says which pins belong together")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(rule.name for rule in self.actions)

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the actions that networks may predict."""
        return tuple(rule.name for rule in self.actions if rule.head)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rules read, each once."""
        return tuple(dict.fromkeys(rule.column for rule in self.actions if rule.column is not None))

    @property
    def affinities(self) -> np.ndarray:
        """float32[A], in the order of the actions."""
        return np.array([rule.affinity for rule in self.actions], np.float32)

    def rule(self, name: str) -> ActionRule:
        """Return an action by name. Raises DatasetError for one that the data does not know."""
        return self.actions[self.position(name)]

    def position(self, name: str) -> int:
        """Return an action's place in the order. Raises DatasetError for one that the data does not know."""
        if name not in self.names:
            raise DatasetError(f"the data has no action {name!r}; it has {', '.join(self.names)} (see {FILE})")
        return self.names.index(name)

    def labels(self, columns: Columns, count: int) -> np.ndarray:
        """Return bool[E, A], which of `count` interactions are which actions; some may be none.

        Columns of numbers are float64, as the file has them: a bound holds for the values that equal it.
        """
        return np.stack([rule.applies(columns, count) for rule in self.actions], axis=-1)


#: The best rating of the scale that `RATINGS` is for.
RATINGS_MAX = 5
#: The actions of ratings from 1 to 5.
RATINGS = ActionSchema(
    actions=(
        ActionRule(name="save", meaning="rated at the top of the scale", column="rating", at_least=5, affinity=1.0),
        ActionRule(
            name="like", meaning="rated well; every save is a like too", column="rating", at_least=4, affinity=0.7
        ),
        ActionRule(name="hide", meaning="rated badly", column="rating", at_most=2, affinity=0.0),
        ActionRule(name="closeup", meaning="rated at all: the user looked closely", affinity=0.3),
    )
)

#: What remains where the data says no more than who and what.
CLOSEUPS = ActionSchema(actions=(ActionRule(name="closeup", meaning="the user interacted with it", affinity=1.0),))


def read_schema(path: Path) -> ActionSchema:
    """Read an `actions.toml`. Raises SettingError that names every mistake in it."""
    try:
        return ActionSchema.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise SettingError(f"cannot read the actions: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        raise SettingError(f"{path}: {_mistakes(error)}") from error


def write_schema(path: Path, schema: ActionSchema) -> None:
    """Write an `actions.toml` that `read_schema` reads back."""
    tables = [
        "\n".join(["[[actions]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]) + "\n"
        for rule in schema.model_dump(exclude_none=True, exclude_defaults=True)["actions"]
    ]
    comment = "# Strongest first; an interaction that is several stands in the sequence as the first.\n\n"
    path.write_text(comment, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(tables))


def _mistakes(error: ValidationError) -> str:
    found = []
    for mistake in error.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in mistake["loc"]).lstrip(".")
        message = mistake["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {message}" if place else message)
    return "; ".join(found)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # TOML's basic strings are JSON's, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
