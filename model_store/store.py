"""Versions, labels and traffic of models: immutable bundles by content, and a history of entries that name them.

    <model>/blobs/<sha256>        manifests and the files they list, by content
    <model>/log/<number>.json     entries (`model_store/history.py`); the newest is the present

Nothing is ever changed in place: a publish writes blobs and then one entry, a label's move is one entry, and two
writers of the same entry number have one winner. So a crash at any byte leaves the store as it was, and at most blobs
that no entry names, for `gc`.
"""

from __future__ import annotations

import getpass
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from model_store.bundle import MANIFEST, Bundle, BundleError, check_size, parse_manifest, read_bundle, sha256
from model_store.history import (
    AnyChange,
    Entry,
    Labelled,
    Published,
    Release,
    Retired,
    State,
    TrafficSet,
    unlabelled,
    version_before,
)
from model_store.manifest import Manifest
from model_store.objects import (
    ModelStoreError,
    MovedError,
    NoObjectError,
    NoVersionError,
    Objects,
    RefusedError,
    open_objects,
)
from model_store.signing import Signer

_MODEL = re.compile(r"^[a-z][a-z0-9-]{0,59}$")
_ENTRY = re.compile(r"^([0-9]{12})\.json$")
#: Attempts to be the one who writes the next entry; each lost one means that somebody else's change went in.
_TRIES = 100
#: A publish must not take longer: younger blobs that no entry names may be about to be named.
GC_GRACE_S = 3_600.0


def whoami() -> str:
    """Return who to name in the audit trail."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


@dataclass(frozen=True, slots=True)
class Swept:
    """What `gc` removed."""

    versions: tuple[int, ...]
    blobs: int
    bytes: int
    unfinished: int


class ModelStore:
    """A model store in a folder or a bucket. Safe to use from many processes and threads at once."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        #: The newest entry read of each model; later ones are looked for after it.
        self._newest: dict[str, Entry] = {}

    @property
    def where(self) -> str:
        return self._objects.where

    def models(self) -> list[str]:
        return [name for name in self._objects.folders() if _MODEL.match(name) and self._objects.listed(f"{name}/log")]

    def head(self, model: str) -> Entry | None:
        """Return a model's newest entry, None before its first version.

        Cost: one listing, and one read when there is a new entry.

        Raises:
            ModelStoreError: the entry cannot be read, or is damaged.
        """
        known = self._newest.get(_checked(model))
        after = f"{known.number:012}.json" if known else ""
        numbers = [found.name for found in self._objects.listed(f"{model}/log", after) if _ENTRY.match(found.name)]
        if numbers:
            known = self._newest[model] = self._entry(model, numbers[-1])
        return known

    def state(self, model: str) -> State:
        entry = self.head(model)
        return entry.state if entry else State()

    def history(self, model: str) -> list[Entry]:
        """Return a model's entries, oldest first."""
        found = self._objects.listed(f"{_checked(model)}/log")
        return [self._entry(model, one.name) for one in found if _ENTRY.match(one.name)]

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
        files = {name: self._blob(manifest.ref, model, name, file.sha256) for name, file in manifest.files.items()}
        return Bundle(manifest, manifest_json, sha256(manifest_json), files)

    def manifest(self, model: str, version: int) -> Manifest:
        """Read one version's manifest alone. Raises ModelStoreError, BundleError."""
        return parse_manifest(self._manifest_json(model, version), f"{model}@{version}")

    def check_writable(self, model: str) -> None:
        """Write and remove an empty object where a version would go. Raises ModelStoreError."""
        probe = f"{_checked(model)}/blobs/{secrets.token_hex(32)}"
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

        def publishing(state: State) -> Published | None:
            there = state.versions.get(manifest.version)
            if there and there.digest == bundle.digest:  # somebody else was faster
                return None
            return Published(version=manifest.version, digest=bundle.digest, signature=signature)

        change = publishing(state := self.state(manifest.name))
        if change is not None:  # a version that is taken shows before anything is written
            change.after(state, manifest.name, datetime.now(UTC), "")
        # Anew even where they are: that makes them young, so that no `gc` takes them meanwhile, and mends lost ones.
        for content in (bundle.manifest_json, *bundle.files.values()):
            self._objects.put(f"{manifest.name}/blobs/{sha256(content)}", content)
        self._append(manifest.name, publishing, by, why or f"trained by: {manifest.lineage.command}")
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
    ) -> Entry | None:
        """Point a label at a version, or remove it; None when it was so already.

        Args:
            model: its name.
            label: new or known.
            version: None removes the label.
            by: who; the process's user without.
            why: for the audit trail.
            expected: refuse unless the label names this version now.
        """

        def moving(state: State) -> Labelled | None:
            now = state.labels.get(label)
            if expected is not None and now != expected:
                raise MovedError(f"{model}: {label} is version {now} by now, not {expected}; nothing was changed")
            if now == version and label in state.labels:
                return None
            return Labelled(label=label, version=version, before=now)

        if version is not None:
            self.read(model, version)  # a label never names what cannot be read
        return self._append(model, moving, by, why)

    def rollback(self, model: str, label: str, *, by: str | None = None, why: str = "") -> Entry:
        """Point a label at the version that it named before.

        Raises:
            ModelStoreError: it never named another, or that one was retired.
        """
        now = self.resolve(model, label)
        before = version_before(self.history(model), label)
        if before is None:
            raise RefusedError(f"{model}: {label} never named another version than {now}; label one by its number")
        entry = self.set_label(model, label, before, by=by, why=why or f"rollback from {now}", expected=now)
        assert entry is not None, "the version before is another one"  # noqa: S101
        return entry

    def set_traffic(
        self, model: str, surface: str, label: str, share: float, *, by: str | None = None, why: str = ""
    ) -> Entry | None:
        """Give a label a share of a surface's requests, 0 to 1; `*` means every surface without a line of its own."""

        def setting(state: State) -> TrafficSet | None:
            before = state.traffic.get(surface, {}).get(label, 0.0)
            return None if before == share else TrafficSet(surface=surface, label=label, share=share, before=before)

        return self._append(model, setting, by, why)

    def gc(self, model: str, keep: int, *, by: str | None = None, grace_s: float = GC_GRACE_S) -> Swept:
        """Retire versions without a label but the newest `keep`, and remove what nothing names any more.

        Args:
            model: its name.
            keep: unlabelled versions that stay, for rolling back by hand.
            by: who; the process's user without.
            grace_s: blobs and unfinished files younger than that stay: a publish may be about to name them.
        """

        def retiring(state: State) -> Retired | None:
            versions = unlabelled(state, keep)
            return Retired(versions=versions) if versions else None

        entry = self._append(model, retiring, by, f"gc, the newest {keep} without a label kept")
        retired = entry.change.versions if entry and isinstance(entry.change, Retired) else ()
        named: set[str] = set()
        for version, release in self.state(model).versions.items():
            named |= {release.digest, *(file.sha256 for file in self.manifest(model, version).files.values())}
        blobs = size = 0
        for found in self._objects.listed(f"{model}/blobs"):
            if found.name not in named and time.time() - found.modified_s >= grace_s:
                self._objects.delete(f"{model}/blobs/{found.name}")
                blobs, size = blobs + 1, size + found.size_bytes
        unfinished = sum(self._objects.sweep(f"{model}/{part}", grace_s) for part in ("blobs", "log"))
        return Swept(retired, blobs, size, unfinished)

    def _manifest_json(self, model: str, version: int) -> bytes:
        return self._blob(f"{model}@{version}", model, MANIFEST, self.release(model, version).digest)

    def _blob(self, ref: str, model: str, name: str, digest: str) -> bytes:
        try:
            content = self._objects.get(f"{model}/blobs/{digest}")
        except NoObjectError as error:
            raise BundleError(f"{ref}: its {name} is gone from {self.where}; publish it again") from error
        if sha256(content) != digest:
            raise BundleError(f"{ref}: {name} was changed or damaged in {self.where}; publish it again")
        return content

    def _entry(self, model: str, name: str) -> Entry:
        content = self._objects.get(f"{model}/log/{name}")
        try:
            return Entry.model_validate_json(content)
        except ValidationError as error:
            raise ModelStoreError(
                f"{self.where}: {model}/log/{name} is damaged ({error.errors()[0]['msg']}); restore it from a backup, "
                "or delete it to go back to the entry before"
            ) from error

    def _append(
        self,
        model: str,
        decide: Callable[[State], AnyChange | None],
        by: str | None,
        why: str,
    ) -> Entry | None:
        """Make a change on the newest state; None when `decide` finds that nothing is to be changed."""
        by = by or whoami()
        for _ in range(_TRIES):
            newest = self.head(model)
            state = newest.state if newest else State()
            change = decide(state)
            if change is None:
                return None
            now = datetime.now(UTC)
            number = newest.number + 1 if newest else 1
            entry = Entry(
                number=number,
                at=now,
                by=by,
                why=why,
                change=change,
                state=change.after(state, model, now, by),
                nonce=secrets.token_hex(8),
            )
            content = entry.model_dump_json(indent=1).encode()
            if self._objects.create(f"{_checked(model)}/log/{number:012}.json", content):
                self._newest[model] = entry
                return entry
        raise ModelStoreError(f"{self.where}: other writers changed {model} {_TRIES} times meanwhile; try again")


def open_model_store(url: str | Path) -> ModelStore:
    """Open the model store in a folder or at `s3://bucket/prefix`."""
    return ModelStore(open_objects(url))


def _checked(model: str) -> str:
    if not _MODEL.match(model):
        raise RefusedError(f"model name {model!r}: use lower-case letters, digits and -, starting with a letter")
    return model
