"""Registers the commands of this folder."""

from __future__ import annotations

import typer

from ranker.cli.data import register as register_data
from ranker.cli.embed.commands import register as register_embed
from ranker.cli.evaluate import evaluate
from ranker.cli.explore import register as register_explore
from ranker.cli.train.commands import train
from ranker.cli.tune import tune


def register(app: typer.Typer) -> None:
    """Add `train`, `evaluate`, `tune`, `data`, `embed` and `explore` to the `pinrank` command."""
    app.command()(train)
    app.command()(evaluate)
    app.command()(tune)
    register_data(app)
    register_embed(app)
    register_explore(app)
