"""Versions, labels and traffic of models: immutable bundles by content, and a history of entries that name them.

    <model>/blobs/<sha256>        manifests and the files they list, by content
    <model>/log/<number>.json     entries (`model_store/registry/history.py`); the newest is the present

Nothing is ever changed in place: a publish writes blobs and then one entry, a label's move is one entry, and two
writers of the same entry number have one winner. So a crash at any byte leaves the store as it was, and at most blobs
that no entry names, for `gc`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from model_store.bundle.files import (
    MANIFEST,
    MANIFEST_BYTES_MAX,
    Bundle,
    BundleError,
    check_size,
    parse_manifest,
    read_bundle,
    sha256,
)
from model_store.bundle.manifest import Manifest
from model_store.registry.entries import Entries, checked_name, is_model
from model_store.registry.history import (
    HistoryEntry,
    LabelMoved,
    ModelState,
    Release,
    TrafficSet,
    VersionPublished,
    VersionsRetired,
    unlabelled,
    versions_named,
)
from model_store.registry.objects import (
    MovedError,
    NoObjectError,
    NoVersionError,
    Objects,
    RefusedError,
    UnfitObjectError,
)
from model_store.registry.open_objects import open_objects
from model_store.registry.signing import Signer

#: A publish must not take longer: younger blobs that no entry names may be about to be named.
GC_GRACE_S = 3_600.0


@dataclass(frozen=True, slots=True)
class GcResult:
    """What `gc` removed."""

    versions: tuple[int, ...]
    blobs: int
    bytes: int
    unfinished: int


class ModelStore:
    """A model store in a folder or a bucket. Safe to use from many processes and threads at once."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._entries = Entries(objects)

    @property
    def where(self) -> str:
        return self._objects.where

    def models(self) -> list[str]:
        return [name for name in self._objects.folders() if is_model(name) and self._objects.listed(f"{name}/log")]

    def head(self, model: str) -> HistoryEntry | None:
        """Return a model's newest entry, None before its first version. Raises ModelStoreError."""
        return self._entries.head(model)

    def state(self, model: str) -> ModelState:
        entry = self.head(model)
        return entry.state if entry else ModelState()

    def history(self, model: str) -> list[HistoryEntry]:
        """Return a model's entries, oldest first. Raises ModelStoreError."""
        return list(self._entries.back(model))[::-1]

    def named(self, model: str, label: str) -> Iterator[int]:
        """Tell the versions that a label named and that are still there, the one it names or named last first."""
        there = self.state(model).versions
        return (version for version in versions_named(self._entries.back(model), label) if version in there)

    def versions(self, model: str) -> list[int]:
        return sorted(self.state(model).versions)

    def labels(self, model: str) -> dict[str, int]:
        return dict(sorted(self.state(model).labels.items()))

    def resolve(self, model: str, label: str) -> int:
        """Return the version that a label names. Raises ModelStoreError."""
        labels = self.labels(model)
        if label not in labels:
            known = ", ".join(labels) or "none yet"
            raise NoVersionError(f"model {model!r} in {self.where} has no label {label!r} (labels: {known})")
        return labels[label]

    def release(self, model: str, version: int) -> Release:
        """Return what the store says of a version. Raises ModelStoreError."""
        state = self.state(model)
        if version not in state.versions:
            held = ", ".join(map(str, sorted(state.versions))) or "none"
            raise NoVersionError(f"model {model!r} in {self.where} has no version {version} (versions: {held})")
        return state.versions[version]

    def read(self, model: str, version: int, bytes_max: int | None = None) -> Bundle:
        """Read and verify one version.

        Args:
            model: its name.
            version: its number.
            bytes_max: refuse a larger bundle before reading it.

        Raises:
            ModelStoreError: there is no such version, or the store cannot be read.
            BundleError: what is wrong with it, by name.
        """
        manifest_json = self._manifest_json(model, version)
        manifest = parse_manifest(manifest_json, f"{model}@{version}")
        if (manifest.name, manifest.version) != (model, version):
            raise BundleError(f"the bundle stored as {model}@{version} says it is {manifest.ref}")
        check_size(manifest, bytes_max)
        files = {
            name: self._blob(manifest.ref, model, name, file.sha256, file.size_bytes)
            for name, file in manifest.files.items()
        }
        return Bundle(manifest, manifest_json, sha256(manifest_json), files)

    def manifest(self, model: str, version: int) -> Manifest:
        """Read one version's manifest alone. Raises ModelStoreError, BundleError."""
        return parse_manifest(self._manifest_json(model, version), f"{model}@{version}")

    def check_writable(self, model: str) -> None:
        """Write and remove an empty object where a version would go. Raises ModelStoreError."""
        probe = f"{checked_name(model)}/blobs/{secrets.token_hex(32)}"
        self._objects.put(probe, b"")
        self._objects.delete(probe)

    def publish(self, folder: Path, *, by: str | None = None, why: str = "", signer: Signer | None = None) -> Bundle:
        """Copy a bundle into the store under its own name and version. The same bundle again is no error.

        Raises:
            BundleError: the folder holds no good bundle.
            ModelStoreError: the version is taken, or the store cannot be written.
        """
        bundle = read_bundle(folder)
        manifest = bundle.manifest
        signature = signer.sign(manifest.ref, bundle.digest) if signer else None

        def publishing(state: ModelState) -> VersionPublished | None:
            there = state.versions.get(manifest.version)
            if there and there.digest == bundle.digest:  # somebody else was faster
                return None
            return VersionPublished(version=manifest.version, digest=bundle.digest, signature=signature)

        change = publishing(state := self.state(manifest.name))
        if change is not None:  # a version that is taken shows before anything is written
            change.after(state, manifest.name, datetime.now(UTC), "")
        # Anew even where they are: that makes them young, so that no `gc` takes them meanwhile, and mends lost ones.
        for content in (bundle.manifest_json, *bundle.files.values()):
            self._objects.put(f"{manifest.name}/blobs/{sha256(content)}", content)
        self._entries.append(manifest.name, publishing, by, why or f"trained by: {manifest.lineage.command}")
        return bundle

    def set_label(
        self,
        model: str,
        label: str,
        version: int | None,
        *,
        by: str | None = None,
        why: str = "",
        expected: int | None = None,
    ) -> HistoryEntry | None:
        """Point a label at a version, or remove it; None when it was so already.

        Args:
            model: its name.
            label: new or known.
            version: None removes the label.
            by: who; the process's user without.
            why: for the audit trail.
            expected: refuse unless the label names this version now.
        """

        def moving(state: ModelState) -> LabelMoved | None:
            now = state.labels.get(label)
            if expected is not None and now != expected:
                raise MovedError(f"{model}: {label} is version {now} by now, not {expected}; nothing was changed")
            if now == version and label in state.labels:
                return None
            return LabelMoved(label=label, version=version, before=now)

        if version is not None:
            self.read(model, version)  # a label never names what cannot be read
        return self._entries.append(model, moving, by, why)

    def rollback(self, model: str, label: str, *, by: str | None = None, why: str = "") -> HistoryEntry:
        """Point a label at the version that it named before.

        Raises:
            ModelStoreError: it never named another, or that one was retired.
        """
        now = self.resolve(model, label)
        before = next((version for version in versions_named(self._entries.back(model), label) if version != now), None)
        if before is None:
            raise RefusedError(f"{model}: {label} never named another version than {now}; label one by its number")
        entry = self.set_label(model, label, before, by=by, why=why or f"rollback from {now}", expected=now)
        assert entry is not None, "the version before is another one"  # noqa: S101
        return entry

    def set_traffic(
        self, model: str, surface: str, label: str, share: float, *, by: str | None = None, why: str = ""
    ) -> HistoryEntry | None:
        """Give a label a share of a surface's requests, 0 to 1; `*` means every surface without a line of its own."""

        def setting(state: ModelState) -> TrafficSet | None:
            before = state.traffic.get(surface, {}).get(label, 0.0)
            return None if before == share else TrafficSet(surface=surface, label=label, share=share, before=before)

        return self._entries.append(model, setting, by, why)

    def gc(self, model: str, keep: int, *, by: str | None = None, grace_s: float = GC_GRACE_S) -> GcResult:
        """Retire versions without a label but the newest `keep`, and remove what nothing names any more.

        Args:
            model: its name.
            keep: unlabelled versions that stay, for rolling back by hand.
            by: who; the process's user without.
            grace_s: blobs and unfinished files younger than that stay: a publish may be about to name them.
        """

        def retiring(state: ModelState) -> VersionsRetired | None:
            versions = unlabelled(state, keep)
            return VersionsRetired(versions=versions) if versions else None

        entry = self._entries.append(model, retiring, by, f"gc, the newest {keep} without a label kept")
        retired = entry.change.versions if entry and isinstance(entry.change, VersionsRetired) else ()
        named: set[str] = set()
        for version, release in self.state(model).versions.items():
            named |= {release.digest, *(file.sha256 for file in self.manifest(model, version).files.values())}
        blobs = size = 0
        for found in self._objects.listed(f"{model}/blobs"):
            if found.name not in named and time.time() - found.modified_s >= grace_s:
                self._objects.delete(f"{model}/blobs/{found.name}")
                blobs, size = blobs + 1, size + found.size_bytes
        unfinished = sum(self._objects.sweep(f"{model}/{part}", grace_s) for part in ("blobs", "log"))
        return GcResult(retired, blobs, size, unfinished)

    def _manifest_json(self, model: str, version: int) -> bytes:
        digest = self.release(model, version).digest
        return self._blob(f"{model}@{version}", model, MANIFEST, digest, MANIFEST_BYTES_MAX)

    def _blob(self, ref: str, model: str, name: str, digest: str, bytes_max: int) -> bytes:
        try:
            content = self._objects.get(f"{model}/blobs/{digest}", bytes_max)
        except UnfitObjectError as error:
            raise BundleError(f"{ref}: {name} was changed or damaged: {error}; publish it again") from error
        except NoObjectError as error:
            raise BundleError(f"{ref}: its {name} is gone from {self.where}; publish it again") from error
        if sha256(content) != digest:
            raise BundleError(f"{ref}: {name} was changed or damaged in {self.where}; publish it again")
        return content


def open_model_store(url: str | Path) -> ModelStore:
    """Open the model store in a folder or at `s3://bucket/prefix`."""
    return ModelStore(open_objects(url))
