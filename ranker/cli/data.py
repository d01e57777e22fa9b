"""`pinrank data`: converts datasets to atomic files and shows what training would see."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ranker.cli.console import (
    ActionsOption,
    ConsoleReporter,
    explained,
    fail,
    note_problems,
    read_dataset,
    read_given_vectors,
    suspicious,
)

if TYPE_CHECKING:
    from ranker.data.atomic.recbole import AtomicDataset
    from ranker.data.inspection import Inspection
    from ranker.data.problems import Problem

SourceArgument = Annotated[Path, typer.Argument(help="Published file: plain, .gz, or the only file in a .zip.")]
OutOption = Annotated[Path, typer.Option(help="New folder for the atomic files.")]


def register(app: typer.Typer) -> None:
    """Add `pinrank data` to the `pinrank` command."""
    group = typer.Typer(no_args_is_help=True, help="Convert datasets and check what training would see.")
    group.command()(check)
    group.command()(fill)
    group.command()(ids)
    group.command()(deskdrop)
    group.command()(grocery)
    group.command()(kuairand)
    group.command(name="ml-1m")(ml_1m)
    app.add_typer(group, name="data")


def deskdrop(source: SourceArgument, out: OutOption) -> None:
    """Convert DeskDrop to atomic files: saves, follows, comments, likes and closeups of articles.

    All that a user does with an article in one session, with at most 30 minutes between two steps, becomes one
    interaction at the time of the last step.

    Example: [bold]pinrank data deskdrop users_interactions.csv.zip --out data/deskdrop[/]
    """
    _convert("deskdrop", source, out)


def grocery(
    source: Annotated[Path, typer.Argument(help="Folder with train.csv and item_meta.csv.")], out: OutOption
) -> None:
    """Convert Amazon's grocery reviews in ReChorus' form to atomic files: reviews, categories and related items.

    Every review is one interaction, at the start of its day. Items get their category, complements and substitutes.

    Example: [bold]pinrank data grocery Grocery_and_Gourmet_Food --out data/grocery[/]
    """
    _convert("grocery", source, out)


def kuairand(source: SourceArgument, out: OutOption) -> None:
    """Convert the like-or-hate extract of KuaiRand-27K to atomic files: real likes and hides of short videos.

    Every row is a video that was liked (label 1) or hated (label 0). Hated videos are logged negatives; the other
    candidates of a request are sampled.

    Example: [bold]pinrank data kuairand processed_standard_kcore_15.tsv.gz --out data/kuairand[/]
    """
    _convert("kuairand", source, out)


def ml_1m(out: OutOption) -> None:
    """Copy MovieLens-1M, which is downloaded on first use, with an actions.toml that you can edit.

    Example: [bold]pinrank data ml-1m --out data/ml-1m[/]
    """
    with explained():
        from ranker.cache_folder import default_cache_dir  # noqa: PLC0415
        from ranker.data import movielens  # noqa: PLC0415
        from ranker.data.schema import FILE, RATINGS, write_schema  # noqa: PLC0415

        if out.exists():
            fail(f"{out} already exists; choose a new folder")
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        reporter.note(movielens.LICENCE.strip())
        with reporter.step("MovieLens-1M"):
            source = movielens.obtain(default_cache_dir())
        out.parent.mkdir(parents=True, exist_ok=True)
        # The folder appears whole or not at all: a partial copy could be mistaken for the dataset.
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as temporary:
            staging = Path(temporary) / out.name
            shutil.copytree(source, staging)
            write_schema(staging / FILE, RATINGS)
            staging.rename(out)
    _say_what_next(out)


def check(
    folder: Annotated[str, typer.Argument(help="Folder of RecBole atomic files, or ml-1m.")],
    actions: ActionsOption = None,
    propose: Annotated[
        bool,
        typer.Option("--propose", help="Write the proposed actions.toml and features.toml into the folder; edit them."),
    ] = False,
) -> None:
    """Show what training would see of a dataset, and each problem with its fix. Exits with 1 if training would fail.

    Where columns could be actions, or columns and vectors features, and no TOML file says so, it shows what such a file
    could say.

    Example: [bold]pinrank data check data/deskdrop[/]

    Example: [bold]pinrank data check my-data --actions other-actions.toml[/]
    """
    with explained():
        from ranker.data.actions import action_log  # noqa: PLC0415
        from ranker.data.atomic.proposals import proposals  # noqa: PLC0415
        from ranker.data.inspection import inspect  # noqa: PLC0415
        from ranker.data.requests import Split  # noqa: PLC0415

        console = Console(markup=False, emoji=False)
        proposed = proposals(Path(folder)) if Path(folder).is_dir() else []
        for proposal in proposed if propose else []:
            (Path(folder) / proposal.name).write_text(proposal.text, encoding="utf-8")
            console.print(f"wrote {Path(folder) / proposal.name}; read and edit it", highlight=False, soft_wrap=True)
        dataset = read_dataset(folder, actions, ConsoleReporter(Console(markup=False, emoji=False, stderr=True)))
        found = inspect(action_log(dataset), Split())
        problems = (*suspicious(dataset), *found.problems)
    _show(console, dataset, found)
    for proposal in [] if propose else proposed:
        console.print(
            f"{proposal.why}; `pinrank data check {folder} --propose` writes this {proposal.name}:\n\n"
            + textwrap.indent(proposal.text, "    "),
            highlight=False,
            soft_wrap=True,
        )
    _show_problems(console, problems)
    if any(problem.kind == "error" for problem in problems):
        raise typer.Exit(1)


def fill(
    folder: Annotated[str, typer.Argument(help="Folder of RecBole atomic files, or ml-1m.")],
    store: Annotated[str, typer.Option("--store", help="Model store: a folder or s3://bucket/prefix.")],
    model: Annotated[str, typer.Option(help="Model whose features to write.")],
    feature_store: Annotated[
        str, typer.Option(help="Feature store to write to: lmdb:///FOLDER or redis://HOST:PORT/0.")
    ],
    label: Annotated[
        str | None, typer.Option(help="Label of the model version (default: stable, or the model's only label).")
    ] = None,
    actions: ActionsOption = None,
    pin_vectors: Annotated[
        Path | None,
        typer.Option(
            help="Vectors of pins, or network.npz, that `pinrank embed` made, in the model's embedding space. Default: "
            "those of the bundle."
        ),
    ] = None,
    *,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace features of the same version that another training wrote."),
    ] = False,
) -> None:
    """Write the features of every pin, user and action sequence of a dataset to a feature store, for one model version.

    Example: [bold]pinrank data fill my-data --store models --model mine --feature-store lmdb:///var/lib/features[/]
    """
    with explained():
        from feature_client.action_times import clock_ms  # noqa: PLC0415
        from feature_client.bulk.write import ForeignValuesError  # noqa: PLC0415
        from feature_client.groups import Embedding  # noqa: PLC0415
        from feature_client.redaction import redacted  # noqa: PLC0415
        from feature_client.stores.open_store import open_store  # noqa: PLC0415
        from feature_client.stores.store import StoreError  # noqa: PLC0415
        from model_store.registry.store import open_model_store  # noqa: PLC0415
        from ranker.data.actions import action_log  # noqa: PLC0415
        from ranker.data.embeddings import embeddings_of  # noqa: PLC0415
        from ranker.data.features import Groups, fill_store  # noqa: PLC0415
        from ranker.data.problems import refuse_future  # noqa: PLC0415
        from ranker.embedding.users.carried import encoders_in  # noqa: PLC0415

        models = open_model_store(store)
        bundle = models.read(model, models.resolve(model, label or _only_label(models.labels(model))))
        groups = Groups.served_by(bundle.manifest, encoders_in([bundle]))
        vectors = embeddings_of(bundle) if pin_vectors is None else read_given_vectors(pin_vectors)
        theirs = groups.pin.field("embedding")
        if pin_vectors is not None and isinstance(theirs, Embedding) and vectors.space != theirs.space:
            fail(
                f"{pin_vectors} has vectors of {vectors.space.ref}, and {bundle.manifest.ref} reads "
                f"{theirs.space.ref}; rotate them with `pinrank embed align`"
            )
        reporter = ConsoleReporter(Console(markup=False, emoji=False, stderr=True))
        dataset = read_dataset(folder, actions, reporter)
        note_problems(dataset, reporter)
        refuse_future(dataset.time_ms, clock_ms())  # before the store is created
        log = action_log(dataset)

        async def write() -> dict[str, int]:
            target = open_store(feature_store, lasting=True)
            await target.start()
            try:
                return await fill_store(target, log, vectors, groups, replace=replace)
            finally:
                await target.close()

        try:
            written = asyncio.run(write())
        except (StoreError, ForeignValuesError) as error:
            fail(str(error))
    counts = ", ".join(f"{count:,} {what}" for what, count in written.items())
    where = f"{counts} for {bundle.manifest.ref} in {redacted(feature_store)}"
    Console(markup=False, emoji=False).print(where, highlight=False, soft_wrap=True)


def _only_label(labels: Mapping[str, int]) -> str:
    """Return the default label: the one that servers use, or the model's only label."""
    return next(iter(labels)) if len(labels) == 1 else "stable"


def ids(
    tokens: Annotated[list[str], typer.Argument(help="User or pin identifiers as they appear in the files.")],
) -> None:
    """Print the 64-bit ids under which identifiers are served. Whole numbers keep their value; others are hashed.

    Example: [bold]pinrank data ids listener-3 song/17[/]
    """
    with explained():
        from ranker.data.atomic.identifiers import misspelt, token_id  # noqa: PLC0415

        for token in tokens:
            if wrong := misspelt(token):
                fail(f"{token!r} is not a valid identifier: the identifier {wrong}")
            typer.echo(f"{token}\t{token_id(token)}")


def _convert(name: str, source: Path, out: Path) -> None:
    with explained():
        from ranker.data.adapters.conversion import convert  # noqa: PLC0415
        from ranker.data.adapters.published import ADAPTERS  # noqa: PLC0415

        count = convert(ADAPTERS[name], source, out)
    Console(markup=False, emoji=False).print(f"wrote {count:,} interactions to {out}", highlight=False)
    _say_what_next(out)


def _say_what_next(out: Path) -> None:
    Console(markup=False, emoji=False).print(
        f"to see what training would see, run: pinrank data check {out}", highlight=False, soft_wrap=True
    )


def _show(console: Console, dataset: AtomicDataset, found: Inspection) -> None:
    from ranker.data.inspection import COLD_BELOW, HEAVY_FROM, PARTS  # noqa: PLC0415
    from ranker.data.problems import date_of  # noqa: PLC0415

    first, last = date_of(found.first_ms), date_of(found.last_ms)
    days = (found.last_ms - found.first_ms) / 86_400_000
    console.print(
        f"{dataset.name}: {found.users:,} users, {found.pins:,} pins, {found.events:,} interactions\n"
        f"from {first} to {last}, {days:,.1f} days\n"
        f"users by interactions: {found.cold:,} cold (below {COLD_BELOW}), {found.light:,} light, "
        f"{found.heavy:,} heavy ({HEAVY_FROM} or more)\n"
        "requests by part: " + ", ".join(f"{n:,} {part}" for n, part in zip(found.requests, PARTS, strict=True)) + "\n"
        f"{found.new_share:.0%} of the interactions in the test part are on pins without earlier interactions",
        highlight=False,
    )
    table = Table(title="actions, strongest first", title_justify="left")
    table.add_column("action")
    table.add_column("predicted")
    for column in ("interactions", "share", *PARTS):
        table.add_column(column, justify="right")
    for action in found.actions:
        parts = [f"{n:,}" for n in action.parts]
        head = "yes" if action.head and action.events else "no"
        table.add_row(action.name, head, f"{action.events:,}", f"{action.share:.2%}", *parts)
    console.print(table)
    for file, columns in dataset.unread.items():
        if columns:
            left_out = f"{file}: these columns are not used: {', '.join(columns)}"
            console.print(left_out, highlight=False, soft_wrap=True)


def _show_problems(console: Console, problems: Sequence[Problem]) -> None:
    for problem in problems:
        colour = "red" if problem.kind == "error" else "yellow"
        kind = (f"{problem.kind}:", f"bold {colour}")
        console.print(Text.assemble(kind, f" {problem.what}\n  fix: {problem.fix}"), soft_wrap=True)
    if not problems:
        console.print("no problems found")
