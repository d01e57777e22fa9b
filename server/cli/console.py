"""The console that commands print to, and the error line that ends a command."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """Open a console that prints titles, paths and hints as they are: brackets are no markup, words no emoji."""
    return Console(markup=False, emoji=False, stderr=stderr)


def fail(message: str, cause: BaseException | None = None) -> NoReturn:
    """Print an error and end with 1."""
    console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(1) from cause
