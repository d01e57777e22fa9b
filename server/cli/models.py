"""`pinrank model`: publish model versions, compare them, and move labels and traffic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kernels.engines import ENGINES
from server.cli.console import console, fail

if TYPE_CHECKING:
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
EngineOption = Annotated[str, typer.Option(help=f"Engine that scores the golden requests: {', '.join(ENGINES)}.")]


@models.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    store: StoreOption,
    label: Annotated[str | None, typer.Option(help="Label to point at the new version.")] = None,
    sign: Annotated[Path | None, typer.Option(help="Ed25519 private key (PEM) to sign the version with.")] = None,
    why: WhyOption = "",
    by: ByOption = None,
    engine: EngineOption = "openvino",
    force: Annotated[
        bool, typer.Option("--force", help="Publish even if the lineage says where the model is behind a baseline.")
    ] = False,
) -> None:
    """Check a bundle as a server would, and copy it into the model store under the name and version in its manifest.

    A model whose lineage says that it is not at least as good as its baselines is published only with --force.

    Example: [bold]pinrank model publish out/ml1m-42 --store models --label canary --why "fresh week"[/]
    """
    from model_store.bundle.files import read_bundle  # noqa: PLC0415
    from model_store.registry.signing import Signer  # noqa: PLC0415

    with explained():
        signer = Signer.read(sign) if sign else None
        checked = read_bundle(folder)
        behind = checked.manifest.lineage.shortfalls
        if behind and not force:
            fail(
                f"{checked.manifest.ref} was not published, because it was not at least as good as its baselines when "
                f"it was trained: {'; '.join(behind)}. Train another version, or use --force"
            )
        proven(checked, engine)
        opened = model_store_at(store)
        bundle = opened.publish(folder, by=by, why=why, signer=signer)
        typer.echo(f"published {bundle.manifest.ref}, digest {bundle.digest}{', signed' if signer else ''}")
        if label:
            show_move(opened.set_label(bundle.manifest.name, label, bundle.manifest.version, by=by, why=why), label)


@models.command("list")
def list_models(store: StoreOption) -> None:
    """List the models of a store, with their versions, labels and traffic.

    Example: [bold]pinrank model list --store models[/]
    """
    table = Table("model", "version", "labels", "traffic", "published", "by", "digest", "signed")
    with explained():
        opened = model_store_at(store)
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
    console().print(table)


@models.command("show")
def show_model(model: ModelArgument, number: VersionArgument, store: StoreOption) -> None:
    """Print the manifest of a version.

    Example: [bold]pinrank model show ml1m 42 --store models[/]
    """
    with explained():
        bundle = model_store_at(store).read(model, number)
    console().print_json(bundle.manifest.model_dump_json())
    typer.echo(f"digest {bundle.digest}")


@models.command()
def pull(model: ModelArgument, number: VersionArgument, folder: FolderArgument, store: StoreOption) -> None:
    """Copy a version from the store into a new folder, and verify its digests.

    Example: [bold]pinrank model pull ml1m 42 ml1m-42 --store models[/]
    """
    from model_store.bundle.files import copy_out  # noqa: PLC0415

    with explained():
        bundle = model_store_at(store).read(model, number)
        copy_out(bundle, folder)
    typer.echo(f"{bundle.manifest.ref} is in {folder}")


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
    """Check a bundle as a server does before it serves it.

    That is: digests, manifest, network, utility table, exploration table, golden scores.

    Example: [bold]pinrank model verify ml1m stable --store models[/]
    """
    from model_store.bundle.files import read_bundle  # noqa: PLC0415
    from model_store.registry.signing import TrustedKeys  # noqa: PLC0415

    with explained():
        if name is None:
            bundle = read_bundle(Path(what))
            if trusted_key:
                fail("signatures are kept in the model store: pass MODEL, VERSION and --store instead of a folder")
        else:
            if store is None:
                fail("pass --store, the model store that holds the model (or set PINRANK_MODEL_STORE)")
            bundle = named_bundle(model_store_at(store), what, name)
            if trusted_key:
                release = model_store_at(store).release(what, bundle.manifest.version)
                TrustedKeys.read(trusted_key).check(bundle.manifest.ref, release.digest, release.signature)
        cost_s = proven(bundle, engine)
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
    with explained():
        entry = model_store_at(store).set_label(model, label, number, by=by, why=why, expected=expected)
    show_move(entry, label)


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
    with explained():
        show_move(model_store_at(store).rollback(model, label, by=by, why=why), label)


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
    with explained():
        entry = model_store_at(store).set_traffic(model, surface, label, percent / 100, by=by, why=why)
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
    with explained():
        for entry in model_store_at(store).history(model)[-last:]:
            table.add_row(str(entry.number), f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.by, _told(entry), entry.why[:160])
    console().print(table)


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
    with explained():
        swept = model_store_at(store).gc(model, keep, by=by, grace_s=grace_s)
    retired = ", ".join(map(str, swept.versions)) or "none"
    typer.echo(
        f"versions retired: {retired}; files deleted: {swept.blobs} ({swept.bytes / 1e6:.1f} MB), "
        f"unfinished files of killed writers deleted: {swept.unfinished}"
    )


def model_store_at(url: str) -> ModelStore:
    from model_store.registry.store import open_model_store  # noqa: PLC0415

    if not url:
        fail("pass --store, the model store (or set PINRANK_MODEL_STORE)")
    return open_model_store(url)


def named_bundle(store: ModelStore, model: str, name: str) -> Bundle:
    """Read the bundle that a version or label names."""
    return store.read(model, int(name) if name.isdigit() else store.resolve(model, name))


def proven(bundle: Bundle, engine: str) -> float:
    """Check a bundle as servers do. Return how long a run of 128 rows takes, in seconds."""
    from kernels.engines import engine_factory  # noqa: PLC0415
    from model_store.exploration.table import read_exploration  # noqa: PLC0415
    from model_store.model.loaded import load_model  # noqa: PLC0415
    from model_store.model.utility import check_time, load_utility  # noqa: PLC0415
    from model_store.network.check import RunLimits  # noqa: PLC0415

    # Skip warming up shapes: nothing is served here, and only the cost of a run is needed.
    model = load_model(bundle, engine_factory(engine), streams=1, progress=lambda *_: False)
    try:
        utility = load_utility(model.utility_toml, model.manifest)
        check_time(utility, RunLimits().rows)
        read_exploration(bundle, utility)
        return model.engine.cost_s(128)
    finally:
        model.engine.close()


def show_move(entry: HistoryEntry | None, label: str) -> None:
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
def explained() -> Iterator[Any]:
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
