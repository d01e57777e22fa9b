"""`pinrank impressions`: commands over an impression log. They import pyarrow when they run: serving may lack it."""

from __future__ import annotations

import typer

from impressions.inspection.commands import check, stat
from impressions.join_command import join


def register(app: typer.Typer) -> None:
    """Add `impressions` to the `pinrank` command."""
    impressions = typer.Typer(no_args_is_help=True, help="Read the log of what was shown, and join it with actions.")
    impressions.command()(stat)
    impressions.command()(check)
    impressions.command()(join)
    app.add_typer(impressions, name="impressions")

    @impressions.callback()
    def group() -> None:
        pass
