"""Options as dataclasses: a command takes one object for each panel of its help instead of a parameter per option."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer


class OptionGroup:
    """Base of a frozen dataclass whose fields are options: `name: Annotated[type, typer.Option(...)] = default`."""

    #: The panel of the command's help that shows these options; None leaves each option where it says.
    panel: ClassVar[str | None] = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let Typer see the fields of a command's option groups as parameters of the command.

    Args:
        command: a function whose every parameter is annotated with a subclass of `OptionGroup`.

    Returns:
        The function that Typer registers; it builds the groups and calls `command` with them.
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
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, shown]
        )
