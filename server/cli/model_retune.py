"""`pinrank model retune`: a new version of the same network with another utility table."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.models import (
    ByOption,
    EngineOption,
    ModelArgument,
    StoreOption,
    WhyOption,
    explained,
    model_store_at,
    models,
    named_bundle,
    proven,
    show_move,
)

if TYPE_CHECKING:
    from model_store.bundle.files import Bundle


@models.command()
def retune(
    model: ModelArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version or label whose network to keep.")],
    utility: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="Utility table (TOML), such as `pinrank tune --out` writes."),
    ],
    store: StoreOption,
    explore: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Exploration table (TOML), empty for none. Default: that of VERSION, if any.",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Label to point at the new version.")] = None,
    sign: Annotated[Path | None, typer.Option(help="Ed25519 private key (PEM) to sign the version with.")] = None,
    why: WhyOption = "",
    by: ByOption = None,
    engine: EngineOption = "openvino",
) -> None:
    """Publish a version's network with another utility table, under the next free version number.

    The golden requests stay, as they hold probabilities, which no utility table changes. The lineage names VERSION as
    the parent, and says how the weights were tuned if the table does.

    Example: [bold]pinrank model retune ml1m 42 --utility utility.toml --label canary --store models[/]
    """
    from model_store.bundle.files import read_bundle  # noqa: PLC0415
    from model_store.registry.history import check_label  # noqa: PLC0415
    from model_store.registry.objects import RefusedError  # noqa: PLC0415
    from model_store.registry.signing import Signer  # noqa: PLC0415

    with explained():
        if label is not None:
            check_label(label)
        signer = Signer.read(sign) if sign else None
        opened = model_store_at(store)
        parent = named_bundle(opened, model, version)
        reason = why or f"{parent.manifest.ref} with another utility table"
        bundle = None
        while bundle is None:
            number = opened.state(model).next_version()
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "bundle"
                _write(folder, parent, number, utility.read_bytes(), None if explore is None else explore.read_bytes())
                proven(read_bundle(folder), engine)
                try:
                    bundle = opened.publish(folder, by=by, why=reason, signer=signer)
                except RefusedError:
                    if opened.state(model).next_version() == number:
                        raise
                    # Another writer took the number meanwhile, so the next one is free.
        typer.echo(
            f"published {bundle.manifest.ref}, the network of {parent.manifest.ref}, digest {bundle.digest}"
            f"{', signed' if signer else ''}"
        )
        if label:
            show_move(opened.set_label(model, label, number, by=by, why=reason), label)


def _write(folder: Path, parent: Bundle, number: int, utility: bytes, explore: bytes | None) -> None:
    """Write the parent's bundle with other tables. Raises UtilityError if the table does not fit the model."""
    from model_store.bundle.files import EXPLORATION, UTILITY, write_bundle  # noqa: PLC0415
    from model_store.bundle.manifest import Manifest  # noqa: PLC0415
    from model_store.model.utility import load_utility, stated_tunings  # noqa: PLC0415

    manifest = parent.manifest
    lineage = manifest.lineage.model_copy(
        update={
            "parent": manifest.ref,
            "command": shlex.join(["pinrank", *sys.argv[1:]]),
            "tuning": stated_tunings(utility, load_utility(utility, manifest)),
        }
    )
    fields = {name: getattr(manifest, name) for name in Manifest.model_fields if name != "files"}
    files = {**parent.files, UTILITY: utility}
    if explore is not None:
        files[EXPLORATION] = explore
    if not files.get(EXPLORATION):  # an empty file ends the exploration, as with `pinrank train --explore`
        files.pop(EXPLORATION, None)
    write_bundle(folder, {**fields, "version": number, "lineage": lineage}, files)
