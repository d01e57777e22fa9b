"""Named actions, each a rule over one column of the dataset."""

from __future__ import annotations

import json
import keyword
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from feature_client.groups import Frozen, Name
from ranker.errors import DatasetError, SettingError

_Model = TypeVar("_Model", bound=BaseModel)

FILE = "actions.toml"
#: Feature groups have a field `<action>_share`, and its name must not exceed the length that `Name` allows.
NAME_LENGTH_MAX = 40 - len("_share")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A column of tokens.

    Attributes:
        sets: the tokens of each distinct value: one, or several in a `token_seq` column.
        code: int[E] positions in `sets`.
    """

    sets: tuple[frozenset[str], ...]
    code: np.ndarray


Columns = Mapping[str, "np.ndarray | Tokens"]


class ActionRule(Frozen):
    """An action and its condition; without a column, every interaction is this action."""

    name: Annotated[Name, Field(max_length=NAME_LENGTH_MAX)]
    meaning: Annotated[str, Field(min_length=1)]
    column: Annotated[str, Field(min_length=1)] | None = None
    at_least: Annotated[float, Field(allow_inf_nan=False, strict=True)] | None = None
    at_most: Annotated[float, Field(allow_inf_nan=False, strict=True)] | None = None
    any_of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    #: How strongly the action shows that user and pin belong together: from 0, no sign or the opposite, to 1.
    affinity: Annotated[float, Field(ge=0, le=1, strict=True)]
    #: Whether networks predict the action; an action without a head is still part of the sequence.
    head: Annotated[bool, Field(strict=True)] = True

    @field_validator("name")
    @classmethod
    def _fits_an_expression(cls, name: str) -> str:
        if keyword.iskeyword(name):
            raise ValueError(f"{name!r} is a reserved word in utility expressions; choose another name")
        return name

    @model_validator(mode="after")
    def _one_condition(self) -> ActionRule:
        given = [c for c in ("at_least", "at_most", "any_of") if getattr(self, c) is not None]
        if self.column is None and given:
            raise ValueError(f"{given[0]} requires a column")
        if self.column is not None and len(given) != 1:
            raise ValueError(
                f"a column requires exactly one of at_least, at_most and any_of, but has {given or 'none'}"
            )
        return self

    def applies(self, columns: Columns, count: int) -> np.ndarray:
        """Return bool[E], which of `count` interactions are this action; the type of its column must match."""
        if self.column is None:
            return np.ones(count, bool)
        column = columns[self.column]
        if isinstance(column, Tokens):
            wanted = frozenset(self.any_of or ())
            found = np.array([not wanted.isdisjoint(held) for held in column.sets], bool)
            return np.asarray(found[column.code])
        return np.asarray(column >= self.at_least if self.at_least is not None else column <= self.at_most)


class ActionSchema(Frozen):
    """The actions of a dataset, strongest first. In the sequence, an interaction counts as the first of its actions."""

    actions: Annotated[tuple[ActionRule, ...], Field(min_length=1, max_length=254)]

    @model_validator(mode="after")
    def _coherent(self) -> ActionSchema:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"action names must be unique, but are {', '.join(self.names)}")
        if not self.heads:
            raise ValueError("every action has head = false, so there is nothing to predict")
        if not self.affinities.any():
            raise ValueError("every action has affinity 0, so nothing shows which pins belong together")
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
        """The distinct columns that the rules read."""
        return tuple(dict.fromkeys(rule.column for rule in self.actions if rule.column is not None))

    @property
    def affinities(self) -> np.ndarray:
        """float32[A], in the order of the actions."""
        return np.array([rule.affinity for rule in self.actions], np.float32)

    def rule(self, name: str) -> ActionRule:
        """Return an action by name. Raises DatasetError for an unknown name."""
        return self.actions[self.position(name)]

    def position(self, name: str) -> int:
        """Return the position of an action. Raises DatasetError for an unknown name."""
        if name not in self.names:
            raise DatasetError(
                f"the data has no action {name!r}; its actions are {', '.join(self.names)} "
                f"(see {FILE}, or --actions FILE)"
            )
        return self.names.index(name)

    def labels(self, columns: Columns, count: int) -> np.ndarray:
        """Return bool[E, A], the actions of each of `count` interactions; an interaction may have none.

        Columns of numbers are float64, as in the file, so that bounds include values equal to them.
        """
        return np.stack([rule.applies(columns, count) for rule in self.actions], axis=-1)


#: The best rating on the scale of `RATINGS`.
RATINGS_MAX = 5
#: The actions of ratings on a scale from 1 to 5.
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

#: For data that has only users, items and times.
CLOSEUPS = ActionSchema(actions=(ActionRule(name="closeup", meaning="the user interacted with it", affinity=1.0),))


def read_schema(path: Path) -> ActionSchema:
    """Read an `actions.toml`. Raises a SettingError that names every mistake."""
    return read_toml(path, ActionSchema, "actions")


def read_toml(path: Path, kind: type[_Model], what: str) -> _Model:
    """Read a TOML file as a model. Raises a SettingError that names every mistake; `what` says what the file holds."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise SettingError(f"cannot read the {what}: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        raise SettingError(f"{path}: {_mistakes(error)}") from error


def write_schema(path: Path, schema: ActionSchema) -> None:
    """Write an `actions.toml` that `read_schema` reads back."""
    tables = [
        "\n".join(["[[actions]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]) + "\n"
        for rule in schema.model_dump(exclude_none=True, exclude_defaults=True)["actions"]
    ]
    comment = "# Strongest action first: in the sequence, an interaction appears as the first of its actions.\n\n"
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
        # Basic strings of TOML are those of JSON, except for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
