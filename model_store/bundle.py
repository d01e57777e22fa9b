"""A bundle on disk: a folder with `manifest.json` and the files it lists, each checked by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model_store.manifest import FileEntry, Manifest

MANIFEST = "manifest.json"
NETWORK = "network.onnx"
UTILITY = "utility.toml"
GOLDEN = "golden.npz"
#: Optional: the embeddings the model was trained on, for stores that do not hold them yet.
EMBEDDINGS = "embeddings.npz"
REQUIRED = (NETWORK, UTILITY, GOLDEN)


class BundleError(Exception):
    """A bundle cannot be served; the message names the file or field at fault."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle in memory. `digest` is the SHA-256 of its manifest, which names every other file's digest."""

    manifest: Manifest
    digest: str
    files: Mapping[str, bytes]


def write_bundle(folder: Path, fields: Mapping[str, Any], files: Mapping[str, bytes]) -> Manifest:
    """Write a new bundle.

    Args:
        folder: must not exist yet.
        fields: the manifest's fields, all but `files`.
        files: contents by name.
    """
    entries = {name: FileEntry(sha256=_sha256(content), size_bytes=len(content)) for name, content in files.items()}
    manifest = Manifest(**{**fields, "files": entries})
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def read_bundle(folder: Path) -> Bundle:
    """Read and verify a bundle: the manifest's fields, every file's size and digest.

    Raises:
        BundleError: what is wrong, by name.
    """
    content = _read(folder, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise BundleError(f"{folder / MANIFEST}: {problems}") from error
    missing = [name for name in REQUIRED if name not in manifest.files]
    if missing:
        raise BundleError(f"{folder / MANIFEST} does not list {', '.join(missing)}")
    files = {}
    for name, entry in manifest.files.items():
        files[name] = _read(folder, name, entry.size_bytes)
        if _sha256(files[name]) != entry.sha256:
            raise BundleError(f"{folder / name}: its digest is not the manifest's; the file was changed or damaged")
    return Bundle(manifest, _sha256(content), files)


def _read(folder: Path, name: str, size_bytes: int | None = None) -> bytes:
    path = folder / name
    try:
        found_bytes = path.stat().st_size
        if size_bytes is not None and found_bytes != size_bytes:
            raise BundleError(f"{path}: {found_bytes} bytes, the manifest says {size_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
