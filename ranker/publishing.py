"""A trained bundle into the model store, under a number that is free, and what remains to be done to serve it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model_store.bundle import Bundle
from model_store.store import ModelStore
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


def publish_bundle(folder: Path, models: ModelStore, bundle: Bundle, label: str | None) -> None:
    """Publish a bundle, and point a label at it."""
    models.publish(folder)
    if label is not None:
        parent = bundle.manifest.lineage.parent
        why = f"trained on from {parent}" if parent else "trained"
        models.set_label(bundle.manifest.name, label, bundle.manifest.version, why=why)


def what_is_left_to_do(models: ModelStore, bundle: Bundle, label: str | None) -> Iterator[str]:
    """Say what a server still needs where it would not answer with a version of this model by itself."""
    manifest = bundle.manifest
    if _DEFAULT_LABEL not in models.labels(manifest.name):
        named = f'set labels = ["{label}"] in the server\'s settings, or ' if label else ""
        yield (
            f"servers answer with the label {_DEFAULT_LABEL}, which {manifest.name} does not have yet: {named}run "
            f"pinrank model label {manifest.name} {_DEFAULT_LABEL} {manifest.version} --store {models.where}"
        )
