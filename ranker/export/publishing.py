"""A trained bundle into the model store, under a number that is free, and what remains to be done to serve it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model_store.bundle.files import Bundle, copy_out, read_bundle
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore
from ranker.errors import SettingError

#: What a server answers with, unless its settings name other labels.
_DEFAULT_LABEL = "stable"


def free_version(models: ModelStore | None, name: str, wanted: int | None) -> int:
    """Return the version to publish as: the one wanted, or the next one.

    Raises:
        SettingError: it is taken; a number is never used twice, not even a retired version's.
    """
    if models is None:
        return wanted or 1
    state = models.state(name)
    if wanted in state.versions or wanted in state.retired:
        what = "published already" if wanted in state.versions else "retired"
        raise SettingError(
            f"{name}@{wanted} is {what}; versions never change: --version {state.next_version()} is free"
        )
    return wanted or state.next_version()


def publish_bundle(folder: Path, models: ModelStore, label: str | None, keep_in: Path | None = None) -> None:
    """Publish a bundle, and point a label at it.

    Args:
        folder: the bundle's.
        models: where to.
        label: None for none.
        keep_in: where `folder` would not stay, a folder to copy the bundle into when the store does not take it.

    Raises:
        ModelStoreError: the store does not take it; the message says where the bundle is.
    """
    bundle = read_bundle(folder)
    manifest = bundle.manifest
    try:
        models.publish(folder)
        if label is not None:
            why = f"trained on from {manifest.lineage.parent}" if manifest.lineage.parent else "trained"
            models.set_label(manifest.name, label, manifest.version, why=why)
    except ModelStoreError as error:
        kept = folder if keep_in is None else keep_in / f"{manifest.name}-{manifest.version}-{bundle.digest[:12]}"
        if not kept.exists():
            copy_out(bundle, kept)
        raise ModelStoreError(
            f"{error}. The bundle is in {kept}: pinrank model publish {kept} --store {models.where}"
            + (f" --label {label}" if label else "")
        ) from error


def what_is_left_to_do(models: ModelStore, bundle: Bundle, label: str | None) -> Iterator[str]:
    """Say what a server still needs where it would not answer with a version of this model by itself."""
    manifest = bundle.manifest
    if _DEFAULT_LABEL not in models.labels(manifest.name):
        named = f'set labels = ["{label}"] in the server\'s settings, or ' if label else ""
        yield (
            f"servers answer with the label {_DEFAULT_LABEL}, which {manifest.name} does not have yet: {named}run "
            f"pinrank model label {manifest.name} {_DEFAULT_LABEL} {manifest.version} --store {models.where}"
        )
