"""Command-line options as dataclasses: a command takes one object per group instead of one parameter per option."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer


class OptionGroup:
    """Base of frozen dataclasses whose fields are options: `name: Annotated[type, typer.Option(...)] = default`.

    A field without a default is a required option.
    """

    #: The help panel for all options of the group; None keeps the panel that each option names.
    panel: ClassVar[str | None] = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Present the fields of a command's option groups to Typer as the command's parameters.

    Args:
        command: a function; each of its parameters is annotated with a subclass of `OptionGroup`.

    Returns:
        A function to register with Typer. It builds the groups and calls `command` with them.
    """
    groups: dict[str, type[Any]] = get_type_hints(command)
    groups.pop("return")

    @functools.wraps(command)
    def registered(**values: Any) -> None:
        command(
            **{
                name: group(**{field.name: values[field.name] for field in fields(group)})
                for name, group in groups.items()
            }
        )

    parameters = [parameter for group in groups.values() for parameter in _parameters(group)]
    registered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    registered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return registered


def _parameters(group: type[Any]) -> Iterator[inspect.Parameter]:
    annotations = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, option = get_args(annotations[field.name])
        shown: typer.models.OptionInfo = copy.copy(option)
        shown.rich_help_panel = group.panel or option.rich_help_panel
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown]
        )
