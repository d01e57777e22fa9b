"""Publishes a trained bundle to the model store under a free version, and explains what is left to do to serve it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model_store.bundle.files import Bundle, copy_out, read_bundle
from model_store.bundle.manifest import Manifest
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore
from ranker.errors import GateError, SettingError

#: The label that servers use unless their settings name others.
_DEFAULT_LABEL = "stable"


def free_version(models: ModelStore | None, name: str, wanted: int | None) -> int:
    """Return the version to publish as: the wanted version, or the next free one.

    Raises:
        SettingError: the version is taken. No number is used twice, not even that of a retired version.
    """
    if models is None:
        return wanted or 1
    state = models.state(name)
    if wanted in state.versions or wanted in state.retired:
        what = "already published" if wanted in state.versions else "retired"
        raise SettingError(
            f"{name}@{wanted} is {what}, and versions never change; use --version {state.next_version()}, which is free"
        )
    return wanted or state.next_version()


def published_manifests(models: ModelStore | None, name: str) -> list[Manifest]:
    """Return the manifests of a model's versions, the oldest first. Raises ModelStoreError, BundleError."""
    return [] if models is None else [models.manifest(name, version) for version in models.versions(name)]


def publish_bundle(
    folder: Path, models: ModelStore, label: str | None, keep_in: Path | None = None, *, force: bool = False
) -> None:
    """Publish a bundle, and move a label to it.

    Args:
        folder: folder of the bundle.
        models: the model store.
        label: the label, or None.
        keep_in: if `folder` is temporary, the folder to copy the bundle to if it is not published.
        force: publish a bundle that is not at least its baselines, too.

    Raises:
        GateError: the bundle is not at least its baselines; the message names its place.
        ModelStoreError: the store rejects the bundle; the message names the place of the bundle.
    """
    bundle = read_bundle(folder)
    manifest = bundle.manifest
    if manifest.lineage.shortfalls and not force:
        raise GateError(
            f"{manifest.ref} was not published, because it is not at least as good as its baselines on the newest "
            f"requests: {'; '.join(manifest.lineage.shortfalls)}. Train longer, on more requests or another variant, "
            f"or use --force. {_kept(bundle, folder, keep_in, models, label)}"
        )
    try:
        models.publish(folder)
        if label is not None:
            why = f"trained on from {manifest.lineage.parent}" if manifest.lineage.parent else "trained"
            models.set_label(manifest.name, label, manifest.version, why=why)
    except ModelStoreError as error:
        raise ModelStoreError(f"{error}. {_kept(bundle, folder, keep_in, models, label)}") from error


def _kept(bundle: Bundle, folder: Path, keep_in: Path | None, models: ModelStore, label: str | None) -> str:
    """Keep a bundle that was not published, and return where it is and how to publish it."""
    manifest = bundle.manifest
    kept = folder if keep_in is None else keep_in / f"{manifest.name}-{manifest.version}-{bundle.digest[:12]}"
    if not kept.exists():
        copy_out(bundle, kept)
    options = (f" --label {label}" if label else "") + (" --force" if manifest.lineage.shortfalls else "")
    command = f"pinrank model publish {kept} --store {models.where}{options}"
    return f"The bundle is in {kept}; to publish it, run: {command}"


def what_is_left_to_do(models: ModelStore, bundle: Bundle, label: str | None) -> Iterator[str]:
    """Describe what is left to do if a server would not use a version of this model by default."""
    manifest = bundle.manifest
    if _DEFAULT_LABEL not in models.labels(manifest.name):
        named = f'set labels = ["{label}"] in the server\'s settings, or ' if label else ""
        yield (
            f"servers use the label {_DEFAULT_LABEL}, which {manifest.name} does not have yet; {named}run "
            f"pinrank model label {manifest.name} {_DEFAULT_LABEL} {manifest.version} --store {models.where}"
        )
