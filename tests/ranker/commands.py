"""Runs `pinrank`'s commands of training and evaluation in this process."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from ranker.cli.commands import register

app = typer.Typer()
register(app)


def run(*arguments: str | Path) -> tuple[int, str]:
    # Rich wraps at the terminal's width; messages are compared without their line breaks.
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())
