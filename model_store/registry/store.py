"""The model store: publish, read and retire versions, and move labels and traffic.

    <model>/blobs/<sha256>        manifests and the files they list, named by their digest
    <model>/log/<number>.json     the history (`model_store/registry/history.py`); the newest entry is the current state

Nothing is changed in place. A publish writes blobs and then one entry; moving a label writes one entry; of two writers
of the same entry number one succeeds. So a crash at any byte leaves the state unchanged, and at most blobs that no
entry names, which `gc` deletes.
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

#: Longest duration of a publish, in seconds. Younger blobs that no entry names may belong to a publish in progress.
GC_GRACE_S = 3_600.0


@dataclass(frozen=True, slots=True)
class GcResult:
    """What `gc` removed: versions, blobs, their total bytes, and unfinished files of killed writers."""

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
        """Return the newest entry of a model, or None before its first version. Raises ModelStoreError."""
        return self._entries.head(model)

    def state(self, model: str) -> ModelState:
        entry = self.head(model)
        return entry.state if entry else ModelState()

    def history(self, model: str) -> list[HistoryEntry]:
        """Return the entries of a model, oldest first. Raises ModelStoreError."""
        return list(self._entries.back(model))[::-1]

    def named(self, model: str, label: str) -> Iterator[int]:
        """Yield the versions that a label has named and that still exist, the most recent first."""
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
        """Return digest, publisher and signature of a version. Raises ModelStoreError."""
        state = self.state(model)
        if version not in state.versions:
            held = ", ".join(map(str, sorted(state.versions))) or "none"
            raise NoVersionError(f"model {model!r} in {self.where} has no version {version} (versions: {held})")
        return state.versions[version]

    def read(self, model: str, version: int, bytes_max: int | None = None) -> Bundle:
        """Read and verify one version.

        Args:
            model: model name.
            version: version number.
            bytes_max: limit on the size of the bundle, checked before its files are read.

        Raises:
            ModelStoreError: the version does not exist, or the store cannot be read.
            BundleError: the bundle is invalid; the message names the file or field at fault.
        """
        manifest_json = self._manifest_json(model, version)
        manifest = parse_manifest(manifest_json, f"{model}@{version}")
        if (manifest.name, manifest.version) != (model, version):
            raise BundleError(f"the manifest of the bundle stored as {model}@{version} says {manifest.ref}")
        check_size(manifest, bytes_max)
        files = {
            name: self._blob(manifest.ref, model, name, file.sha256, file.size_bytes)
            for name, file in manifest.files.items()
        }
        return Bundle(manifest, manifest_json, sha256(manifest_json), files)

    def manifest(self, model: str, version: int) -> Manifest:
        """Read only the manifest of a version. Raises ModelStoreError, BundleError."""
        return parse_manifest(self._manifest_json(model, version), f"{model}@{version}")

    def check_writable(self, model: str) -> None:
        """Check write access by writing and deleting an empty blob. Raises ModelStoreError."""
        probe = f"{checked_name(model)}/blobs/{secrets.token_hex(32)}"
        self._objects.put(probe, b"")
        self._objects.delete(probe)

    def publish(self, folder: Path, *, by: str | None = None, why: str = "", signer: Signer | None = None) -> Bundle:
        """Copy a bundle into the store under the name and version in its manifest. Publishing it again is not an error.

        Raises:
            BundleError: the folder does not contain a valid bundle.
            ModelStoreError: the version number is taken, or the store cannot be written.
        """
        bundle = read_bundle(folder)
        manifest = bundle.manifest
        signature = signer.sign(manifest.ref, bundle.digest) if signer else None

        def publishing(state: ModelState) -> VersionPublished | None:
            there = state.versions.get(manifest.version)
            if there and there.digest == bundle.digest:  # another writer published it first
                return None
            return VersionPublished(version=manifest.version, digest=bundle.digest, signature=signature)

        change = publishing(state := self.state(manifest.name))
        if change is not None:  # refuse a taken version number before writing anything
            change.after(state, manifest.name, datetime.now(UTC), "")
        # Existing blobs are rewritten too: that makes them young, so that `gc` keeps them, and repairs damaged ones.
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
        """Point a label at a version, or remove it. Return None if there is nothing to change.

        Args:
            model: model name.
            label: a new or existing label.
            version: version number; None removes the label.
            by: author for the audit trail; None means the user of this process.
            why: reason for the audit trail.
            expected: refuse unless the label names this version now.
        """

        def moving(state: ModelState) -> LabelMoved | None:
            now = state.labels.get(label)
            if expected is not None and now != expected:
                raise MovedError(f"{model}: {label} now names version {now}, not {expected}; nothing was changed")
            if now == version and label in state.labels:
                return None
            return LabelMoved(label=label, version=version, before=now)

        if version is not None:
            self.read(model, version)  # a label must never name an unreadable version
        return self._entries.append(model, moving, by, why)

    def rollback(self, model: str, label: str, *, by: str | None = None, why: str = "") -> HistoryEntry:
        """Point a label at the version that it named before.

        Raises:
            ModelStoreError: the label never named another version, or that version was retired.
        """
        now = self.resolve(model, label)
        before = next((version for version in versions_named(self._entries.back(model), label) if version != now), None)
        if before is None:
            raise RefusedError(
                f"{model}: {label} never named a version other than {now}; set the label to a version number instead"
            )
        entry = self.set_label(model, label, before, by=by, why=why or f"rollback from {now}", expected=now)
        assert entry is not None, "the previous version differs from the current one"  # noqa: S101
        return entry

    def set_traffic(
        self, model: str, surface: str, label: str, share: float, *, by: str | None = None, why: str = ""
    ) -> HistoryEntry | None:
        """Give a label a share, 0 to 1, of a surface's requests. `*` means every surface without shares of its own."""

        def setting(state: ModelState) -> TrafficSet | None:
            before = state.traffic.get(surface, {}).get(label, 0.0)
            return None if before == share else TrafficSet(surface=surface, label=label, share=share, before=before)

        return self._entries.append(model, setting, by, why)

    def gc(self, model: str, keep: int, *, by: str | None = None, grace_s: float = GC_GRACE_S) -> GcResult:
        """Retire all but the newest `keep` versions without a label, and delete blobs that no version uses.

        Args:
            model: model name.
            keep: number of unlabelled versions to keep, for manual rollbacks.
            by: author for the audit trail; None means the user of this process.
            grace_s: keep younger blobs and unfinished files, in seconds: a publish in progress may need them.
        """

        def retiring(state: ModelState) -> VersionsRetired | None:
            versions = unlabelled(state, keep)
            return VersionsRetired(versions=versions) if versions else None

        entry = self._entries.append(model, retiring, by, f"gc: kept the newest {keep} without a label")
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
            raise BundleError(f"{ref}: its {name} is missing from {self.where}; publish it again") from error
        if sha256(content) != digest:
            raise BundleError(f"{ref}: {name} was changed or damaged in {self.where}; publish it again")
        return content


def open_model_store(url: str | Path) -> ModelStore:
    """Open the model store in a folder or at `s3://bucket/prefix`."""
    return ModelStore(open_objects(url))
