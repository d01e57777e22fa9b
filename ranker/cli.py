"""Where this folder's commands are added to the command line."""

from __future__ import annotations

import typer

from ranker import data_cli
from ranker.evaluate_cli import evaluate
from ranker.train_cli import train


def register(app: typer.Typer) -> None:
    """Add this folder's commands to the `pinrank` command."""
    app.command()(train)
    app.command()(evaluate)
    data_cli.register(app)
