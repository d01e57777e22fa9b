"""Where versions and labels live: a folder `<root>/<model>/versions/<number>/` and `<root>/<model>/labels/<label>`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_store.bundle import MANIFEST, Bundle, BundleError, read_bundle

_LABEL = re.compile(r"^[a-z][a-z0-9_-]{0,39}$")
_NUMBER = re.compile(rb"^[0-9]{1,18}$")
_MODEL = re.compile(r"^[a-z][a-z0-9-]{0,59}$")


class ModelStoreError(Exception):
    """The store does not hold what was asked for, or refuses a change; the message says what would fix it."""


class FolderStore:
    """A model store in a folder. Versions are immutable; a version or label is whole or not there at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def models(self) -> list[str]:
        if not self._root.is_dir():
            raise ModelStoreError(f"no model store at {self._root}")
        return sorted(p.name for p in self._root.iterdir() if (p / "versions").is_dir())

    def versions(self, model: str) -> list[int]:
        folder = self._model(model) / "versions"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def labels(self, model: str) -> dict[str, int]:
        folder = self._model(model) / "labels"
        if not folder.is_dir():
            return {}
        return {p.name: _read_label(p) for p in sorted(folder.iterdir()) if _LABEL.match(p.name)}

    def resolve(self, model: str, label: str) -> int:
        path = self._model(model) / "labels" / label
        if not _LABEL.match(label) or not path.exists():
            known = ", ".join(sorted(p.name for p in path.parent.glob("[a-z]*"))) or "none yet"
            raise ModelStoreError(f"model {model!r} in {self._root} has no label {label!r} (labels: {known})")
        return _read_label(path)

    def read(self, model: str, version: int) -> Bundle:
        """Read and verify one version. Raises ModelStoreError, BundleError."""
        if version not in self.versions(model):
            held = ", ".join(map(str, self.versions(model))) or "none"
            raise ModelStoreError(f"model {model!r} in {self._root} has no version {version} (versions: {held})")
        bundle = read_bundle(self._model(model) / "versions" / str(version))
        if (bundle.manifest.name, bundle.manifest.version) != (model, version):
            raise BundleError(f"the bundle stored as {model}@{version} says it is {bundle.manifest.ref}")
        return bundle

    def publish(self, folder: Path) -> Bundle:
        """Copy a bundle into the store under its own name and version. The same bundle again is no error."""
        bundle = read_bundle(folder)
        manifest = bundle.manifest
        target = self._model(manifest.name) / "versions" / str(manifest.version)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target.parent) as staging:
            shutil.copyfile(folder / MANIFEST, staging / MANIFEST)
            for name, content in bundle.files.items():  # what was verified, not what the folder holds by now
                (staging / name).write_bytes(content)
            for name in (MANIFEST, *bundle.files):
                _fsync(staging / name)
            _fsync(staging)
            try:
                staging.rename(target)
            except OSError as error:
                if not target.is_dir():
                    raise
                if read_bundle(target).digest != bundle.digest:
                    raise ModelStoreError(
                        f"{manifest.ref} is already published with other content; versions are immutable, "
                        f"publish as version {max(self.versions(manifest.name)) + 1}"
                    ) from error
        _fsync(target.parent)
        return bundle

    def set_label(self, model: str, label: str, version: int) -> None:
        """Point a label at a version, atomically."""
        if not _LABEL.match(label):
            raise ModelStoreError(f"label {label!r}: use lower-case letters, digits, - and _, starting with a letter")
        self.read(model, version)
        folder = self._model(model) / "labels"
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", delete=False) as file:
            file.write(f"{version}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(folder / label)
        _fsync(folder)

    def _model(self, model: str) -> Path:
        if not _MODEL.match(model):
            raise ModelStoreError(f"model name {model!r}: use lower-case letters, digits and -, starting with a letter")
        return self._root / model


def _read_label(path: Path) -> int:
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise ModelStoreError(f"label file {path}: {error.strerror}; set the label again") from error
    if not _NUMBER.match(content):
        raise ModelStoreError(f"label file {path} holds {content[:20]!r}, not a version number; set the label again")
    return int(content)


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """Give a folder beside the target, named so that no reader takes it for a version; gone afterwards."""
    staging = Path(tempfile.mkdtemp(prefix=".publishing-", dir=parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
