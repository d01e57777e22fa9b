"""`pinrank model`: publish model versions, compare them, and move labels and traffic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.features import fail, log_warnings, run_store_work, started_store

if TYPE_CHECKING:
    from feature_client.bulk.coverage import Coverage
    from model_store.bundle.files import Bundle
    from model_store.registry.history import HistoryEntry
    from model_store.registry.store import ModelStore

models = typer.Typer(
    no_args_is_help=True, help="Publish, compare and label model versions, and see what running servers do with them."
)

StoreOption = Annotated[
    str, typer.Option("--store", help="Model store: a folder, or s3://bucket/prefix.", envvar="PINRANK_MODEL_STORE")
]
ModelArgument = Annotated[str, typer.Argument(help="Model name.")]
VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", help="Version number.")]
LabelArgument = Annotated[str, typer.Argument(help="Label, for example stable or canary.")]
WhyOption = Annotated[str, typer.Option("--why", help="Reason, for the audit trail.")]
ByOption = Annotated[str | None, typer.Option("--by", help="Author, for the audit trail (default: user@host).")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder to create.")]
EngineOption = Annotated[str, typer.Option(help="Engine that scores the golden requests.")]


@models.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    store: StoreOption,
    label: Annotated[str | None, typer.Option(help="Label to point at the new version.")] = None,
    sign: Annotated[Path | None, typer.Option(help="Ed25519 private key (PEM) to sign the version with.")] = None,
    why: WhyOption = "",
    by: ByOption = None,
    engine: EngineOption = "openvino",
) -> None:
    """Check a bundle as a server would, and copy it into the model store under the name and version in its manifest.

    Example: [bold]pinrank model publish out/ml1m-42 --store models --label canary --why "fresh week"[/]
    """
    from model_store.bundle.files import read_bundle  # noqa: PLC0415
    from model_store.registry.signing import Signer  # noqa: PLC0415

    with _explained():
        signer = Signer.read(sign) if sign else None
        _proven(read_bundle(folder), engine)
        opened = _store(store)
        bundle = opened.publish(folder, by=by, why=why, signer=signer)
        typer.echo(f"published {bundle.manifest.ref}, digest {bundle.digest}{', signed' if signer else ''}")
        if label:
            _moved(opened.set_label(bundle.manifest.name, label, bundle.manifest.version, by=by, why=why), label)


@models.command("list")
def list_models(store: StoreOption) -> None:
    """List the models of a store, with their versions, labels and traffic.

    Example: [bold]pinrank model list --store models[/]
    """
    table = Table("model", "version", "labels", "traffic", "published", "by", "digest", "signed")
    with _explained():
        opened = _store(store)
        for model in opened.models():
            state = opened.state(model)
            for number, release in sorted(state.versions.items()):
                labels = [label for label, version in sorted(state.labels.items()) if version == number]
                traffic = [
                    f"{surface} {shares[label]:.0%}"
                    for surface, shares in sorted(state.traffic.items())
                    for label in labels
                    if label in shares
                ]
                table.add_row(
                    model, str(number), ", ".join(labels), ", ".join(traffic), f"{release.published_at:%Y-%m-%d %H:%M}",
                    release.published_by, release.digest[:12], "yes" if release.signature else "",
                )  # fmt: skip
    Console(markup=False, emoji=False).print(table)


@models.command("show")
def show_model(model: ModelArgument, number: VersionArgument, store: StoreOption) -> None:
    """Print the manifest of a version.

    Example: [bold]pinrank model show ml1m 42 --store models[/]
    """
    with _explained():
        bundle = _store(store).read(model, number)
    Console(markup=False, emoji=False).print_json(bundle.manifest.model_dump_json())
    typer.echo(f"digest {bundle.digest}")


@models.command()
def pull(model: ModelArgument, number: VersionArgument, folder: FolderArgument, store: StoreOption) -> None:
    """Copy a version from the store into a new folder, and verify its digests.

    Example: [bold]pinrank model pull ml1m 42 ml1m-42 --store models[/]
    """
    from model_store.bundle.files import copy_out  # noqa: PLC0415

    with _explained():
        bundle = _store(store).read(model, number)
        copy_out(bundle, folder)
    typer.echo(f"{bundle.manifest.ref} is in {folder}")


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
    from model_store.model.compatibility import Effect, compare  # noqa: PLC0415

    with _explained():
        opened = _store(store)
        before, after = (_named(opened, model, name) for name in (old, new))
        findings = compare(before, after)
        coverages = _coverage(feature_store, after) if feature_store else None
    console = Console(markup=False, emoji=False)
    console.print(f"{before.manifest.ref} -> {after.manifest.ref}", highlight=False)
    titles = {
        Effect.CALLERS: Text("breaks callers", "bold red"),
        Effect.FEATURES: Text("reads other features", "bold yellow"),
        Effect.NOTE: Text("worth knowing", "bold"),
    }
    for effect, title in titles.items():
        concerned = [finding for finding in findings if finding.effect is effect]
        if not concerned or (effect is Effect.NOTE and not verbose):
            continue
        console.print(title)
        for finding in concerned:
            console.print(f"  {finding.field}", highlight=False, style="bold")
            console.print(f"    was   {finding.expected}", highlight=False, soft_wrap=True)
            console.print(f"    is    {finding.found}", highlight=False, soft_wrap=True)
            if finding.fix:
                console.print(f"    fix   {finding.fix}", highlight=False, soft_wrap=True)
    notes = sum(finding.effect is Effect.NOTE for finding in findings)
    if notes and not verbose:
        console.print(f"other differences that need no action: {notes} (--all shows them)", highlight=False)
    for coverage in coverages or ():
        style = "green" if coverage.enough else "bold red"
        console.print(f"  {coverage}", style=style, highlight=False, soft_wrap=True)
    breaks = any(finding.effect is Effect.CALLERS for finding in findings)
    needs = any(finding.effect is Effect.FEATURES for finding in findings) and coverages is None
    lacking = any(not coverage.enough for coverage in coverages or ())
    if needs:
        console.print("pass --feature-store URL to check that the features are in the store")
    if not breaks and not lacking:
        console.print("callers need no change" + ("" if needs else "; a server can serve this version"), style="green")
    if breaks or lacking:
        raise typer.Exit(1)


@models.command()
def verify(
    what: Annotated[
        str, typer.Argument(metavar="FOLDER|MODEL", help="Folder of a bundle; or the name of a model in --store.")
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="[VERSION|LABEL]", help="Version or label of the model.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--store", help="Model store: a folder, or s3://bucket/prefix.", envvar="PINRANK_MODEL_STORE"),
    ] = None,
    engine: EngineOption = "openvino",
    trusted_key: Annotated[
        list[Path] | None, typer.Option(help="Public key (PEM) that must have signed the version; may be repeated.")
    ] = None,
) -> None:
    """Check a bundle as a server does before it serves it: digests, manifest, network, utility table, golden scores.

    Example: [bold]pinrank model verify ml1m stable --store models[/]
    """
    from model_store.bundle.files import read_bundle  # noqa: PLC0415
    from model_store.registry.signing import TrustedKeys  # noqa: PLC0415

    with _explained():
        if name is None:
            bundle = read_bundle(Path(what))
            if trusted_key:
                fail("signatures are kept in the model store: pass MODEL, VERSION and --store instead of a folder")
        else:
            if store is None:
                fail("pass --store, the model store that holds the model (or set PINRANK_MODEL_STORE)")
            bundle = _named(_store(store), what, name)
            if trusted_key:
                release = _store(store).release(what, bundle.manifest.version)
                TrustedKeys.read(trusted_key).check(bundle.manifest.ref, release.digest, release.signature)
        cost_s = _proven(bundle, engine)
    typer.echo(f"{bundle.manifest.ref} passes every check: digest {bundle.digest}, 128 rows take {cost_s * 1e3:.2f} ms")


@models.command("label")
def set_label(
    model: ModelArgument,
    label: LabelArgument,
    number: Annotated[int | None, typer.Argument(metavar="VERSION", help="Version number.")] = None,
    store: StoreOption = "",
    remove: Annotated[bool, typer.Option("--remove", help="Remove the label.")] = False,
    expected: Annotated[
        int | None, typer.Option("--if-version", help="Move the label only if it names this version now.")
    ] = None,
    why: WhyOption = "",
    by: ByOption = None,
) -> None:
    """Point a label at a version. Running servers follow within seconds, as soon as they have checked the version.

    Example: [bold]pinrank model label ml1m canary 42 --store models --why "fresh week"[/]
    """
    if (number is None) != remove:
        fail("pass either the VERSION to point the label at, or --remove")
    with _explained():
        entry = _store(store).set_label(model, label, number, by=by, why=why, expected=expected)
    _moved(entry, label)


@models.command()
def rollback(
    model: ModelArgument,
    label: Annotated[str, typer.Argument(help="Label to move back.")] = "stable",
    store: StoreOption = "",
    why: WhyOption = "",
    by: ByOption = None,
) -> None:
    """Point a label back at the version that it named before.

    Example: [bold]pinrank model rollback ml1m stable --store models[/]
    """
    with _explained():
        _moved(_store(store).rollback(model, label, by=by, why=why), label)


@models.command()
def traffic(
    model: ModelArgument,
    label: LabelArgument,
    percent: Annotated[float, typer.Argument(min=0, max=100, help="Percentage of the requests that name no label.")],
    store: StoreOption,
    surface: Annotated[str, typer.Option(help="Surface; * means every surface without a share of its own.")] = "*",
    why: WhyOption = "",
    by: ByOption = None,
) -> None:
    """Give a label a share of the traffic. Each user stays with one label, also when the share grows.

    Example: [bold]pinrank model traffic ml1m canary 5 --surface home --store models[/]
    """
    with _explained():
        entry = _store(store).set_traffic(model, surface, label, percent / 100, by=by, why=why)
    typer.echo(
        f"{model}: {label} answers {percent:g}% of {surface}"
        if entry
        else "nothing to change: the label has this share already"
    )


@models.command()
def history(
    model: ModelArgument,
    store: StoreOption,
    last: Annotated[int, typer.Option(min=1, help="Number of newest changes to print.")] = 20,
) -> None:
    """Print the audit trail of a model: who changed what, when and why.

    Example: [bold]pinrank model history ml1m --store models[/]
    """
    table = Table("#", "when", "who", "what", "why")
    with _explained():
        for entry in _store(store).history(model)[-last:]:
            table.add_row(str(entry.number), f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.by, _told(entry), entry.why[:80])
    Console(markup=False, emoji=False).print(table)


@models.command()
def gc(
    model: ModelArgument,
    store: StoreOption,
    keep: Annotated[int, typer.Option(min=0, help="Number of newest unlabelled versions to keep.")] = 5,
    grace_s: Annotated[
        float,
        typer.Option(min=0, help="Keep files younger than this, in seconds: a publish in progress may need them."),
    ] = 3_600,
    by: ByOption = None,
) -> None:
    """Retire versions without a label, and delete the files that no version needs any more.

    Example: [bold]pinrank model gc ml1m --keep 5 --store models[/]
    """
    with _explained():
        swept = _store(store).gc(model, keep, by=by, grace_s=grace_s)
    retired = ", ".join(map(str, swept.versions)) or "none"
    typer.echo(
        f"versions retired: {retired}; files deleted: {swept.blobs} ({swept.bytes / 1e6:.1f} MB), "
        f"unfinished files of killed writers deleted: {swept.unfinished}"
    )


def _store(url: str) -> ModelStore:
    from model_store.registry.store import open_model_store  # noqa: PLC0415

    if not url:
        fail("pass --store, the model store (or set PINRANK_MODEL_STORE)")
    return open_model_store(url)


def _named(store: ModelStore, model: str, name: str) -> Bundle:
    """Read the bundle that a version or label names."""
    return store.read(model, int(name) if name.isdigit() else store.resolve(model, name))


def _proven(bundle: Bundle, engine: str) -> float:
    """Check a bundle as servers do. Return how long a run of 128 rows takes, in seconds."""
    from kernels.engines import engine_factory  # noqa: PLC0415
    from model_store.model.loaded import load_model  # noqa: PLC0415
    from model_store.model.utility import load_utility  # noqa: PLC0415

    # Skip warming up shapes: nothing is served here, and only the cost of a run is needed.
    model = load_model(bundle, engine_factory(engine), streams=1, progress=lambda *_: False)
    try:
        load_utility(model.utility_toml, model.manifest)
        return model.engine.cost_s(1, 128)
    finally:
        model.engine.close()


def _coverage(url: str, bundle: Bundle) -> list[Coverage]:
    from feature_client.bulk.coverage import coverage  # noqa: PLC0415

    log_warnings(url)

    async def run() -> list[Coverage]:
        async with started_store(url, read_only=True) as store:
            with Console(markup=False, emoji=False, stderr=True).status("sampling the feature store"):
                return await coverage(store, bundle.manifest.needs)

    found: list[Coverage] = run_store_work(run())
    return found


def _moved(entry: HistoryEntry | None, label: str) -> None:
    if entry is None:
        typer.echo(f"nothing to change: {label} names this version already")
    else:
        typer.echo(_told(entry))


def _told(entry: HistoryEntry) -> str:
    from model_store.registry.history import LabelMoved, TrafficSet, VersionPublished, VersionsRetired  # noqa: PLC0415

    match entry.change:
        case VersionPublished(version=version, digest=digest, signature=signature):
            return f"published {version} ({digest[:12]}{', signed' if signature else ''})"
        case LabelMoved(label=label, version=None, before=before):
            return f"removed {label} (was {before})"
        case LabelMoved(label=label, version=version, before=before):
            return f"{label}: {'none' if before is None else before} -> {version}"
        case TrafficSet(surface=surface, label=label, share=share, before=before):
            return f"{label} on {surface}: {before:.0%} -> {share:.0%}"
        case VersionsRetired(versions=versions):
            return f"retired {', '.join(map(str, versions))}"


@contextmanager
def _explained() -> Iterator[Any]:
    """Turn errors of stores, bundles, keys and engines into a message and exit status."""
    from kernels.engine import EngineError  # noqa: PLC0415
    from model_store.bundle.files import BundleError  # noqa: PLC0415
    from model_store.model.utility import UtilityError  # noqa: PLC0415
    from model_store.registry.objects import ModelStoreError  # noqa: PLC0415
    from model_store.registry.signing import SigningError  # noqa: PLC0415

    try:
        yield
    except (BundleError, EngineError, ModelStoreError, SigningError, UtilityError, ValueError) as error:
        fail(str(error))
