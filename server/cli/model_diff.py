"""`pinrank model diff`: what must change in callers and in the feature store before a version can replace another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from server.cli.console import console
from server.cli.features import log_warnings, run_store_work, started_store
from server.cli.models import ModelArgument, StoreOption, explained, model_store_at, models, named_bundle

if TYPE_CHECKING:
    from feature_client.bulk.coverage import Coverage
    from model_store.bundle.files import Bundle


@models.command()
def diff(
    model: ModelArgument,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Version or label to replace.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Version or label to replace it with.")],
    store: StoreOption,
    feature_store: Annotated[
        str | None,
        typer.Option(help="Feature store to sample for the features that NEW reads.", envvar="PINRANK_FEATURE_STORE"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--all", help="Also list differences that need no action.")] = False,
) -> None:
    """Show what must change in callers and in the feature store before NEW can replace OLD.

    The exit status is 1 if NEW would refuse today's callers, or if the feature store lacks features that NEW reads.

    Example: [bold]pinrank model diff ml1m stable 42 --store models --feature-store redis://localhost:6379/0[/]
    """
    from model_store.exploration.differences import exploration_findings  # noqa: PLC0415
    from model_store.model.compatibility import Effect, compare  # noqa: PLC0415

    with explained():
        opened = model_store_at(store)
        before, after = (named_bundle(opened, model, name) for name in (old, new))
        findings = [*compare(before, after), *exploration_findings(before, after)]
        coverages = _coverage(feature_store, after) if feature_store else None
    out = console()
    out.print(f"{before.manifest.ref} -> {after.manifest.ref}", highlight=False)
    titles = {
        Effect.CALLERS: Text("breaks callers", "bold red"),
        Effect.FEATURES: Text("reads other features", "bold yellow"),
        Effect.NOTE: Text("worth knowing", "bold"),
    }
    for effect, title in titles.items():
        concerned = [finding for finding in findings if finding.effect is effect]
        if not concerned or (effect is Effect.NOTE and not verbose):
            continue
        out.print(title)
        for finding in concerned:
            out.print(f"  {finding.field}", highlight=False, style="bold")
            out.print(f"    was   {finding.expected}", highlight=False, soft_wrap=True)
            out.print(f"    is    {finding.found}", highlight=False, soft_wrap=True)
            if finding.fix:
                out.print(f"    fix   {finding.fix}", highlight=False, soft_wrap=True)
    notes = sum(finding.effect is Effect.NOTE for finding in findings)
    if notes and not verbose:
        out.print(f"other differences that need no action: {notes} (--all shows them)", highlight=False)
    for coverage in coverages or ():
        style = "green" if coverage.enough else "bold red"
        out.print(f"  {coverage}", style=style, highlight=False, soft_wrap=True)
    breaks = any(finding.effect is Effect.CALLERS for finding in findings)
    needs = any(finding.effect is Effect.FEATURES for finding in findings) and coverages is None
    lacking = any(not coverage.enough for coverage in coverages or ())
    if needs:
        out.print("pass --feature-store URL to check that the features are in the store")
    if not breaks and not lacking:
        out.print("callers need no change" + ("" if needs else "; a server can serve this version"), style="green")
    if breaks or lacking:
        raise typer.Exit(1)


def _coverage(url: str, bundle: Bundle) -> list[Coverage]:
    from feature_client.bulk.coverage import coverage  # noqa: PLC0415

    log_warnings(url)

    async def run() -> list[Coverage]:
        async with started_store(url, read_only=True) as store:
            with console(stderr=True).status("sampling the feature store"):
                return await coverage(store, bundle.manifest.needs)

    found: list[Coverage] = run_store_work(run())
    return found
