"""A bundle: `manifest.json` and the files it lists, each checked by digest."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model_store.bundle.manifest import FileEntry, Manifest
from model_store.bundle.plain_files import UnfitFileError, read_plain

MANIFEST = "manifest.json"
NETWORK = "network.onnx"
UTILITY = "utility.toml"
GOLDEN = "golden.npz"
#: Optional: the embeddings the model was trained on, for stores that do not hold them yet.
EMBEDDINGS = "embeddings.npz"
#: Optional: what inputs and predictions looked like when the model was trained, for telling drift.
STATISTICS = "statistics.json"
#: Optional: the network's parameters as they were learned, for training on from them.
PARAMETERS = "parameters.npz"
REQUIRED = (NETWORK, UTILITY, GOLDEN)
#: A manifest describes; what is larger describes nothing.
MANIFEST_BYTES_MAX = 4 << 20


class BundleError(Exception):
    """A bundle cannot be served; the message names the file or field at fault."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle in memory. `digest` is the SHA-256 of its manifest, which names every other file's digest."""

    manifest: Manifest
    manifest_json: bytes
    digest: str
    files: Mapping[str, bytes]


def write_bundle(folder: Path, fields: Mapping[str, Any], files: Mapping[str, bytes]) -> Manifest:
    """Write a new bundle.

    Args:
        folder: must not exist yet.
        fields: the manifest's fields, all but `files`.
        files: contents by name.
    """
    entries = {name: FileEntry(sha256=sha256(content), size_bytes=len(content)) for name, content in files.items()}
    manifest = Manifest(**{**fields, "files": entries})
    _write(folder, (manifest.model_dump_json(indent=2) + "\n").encode(), files)
    return manifest


def copy_out(bundle: Bundle, folder: Path) -> None:
    """Write a bundle, as it was read, into a folder that must not exist yet. Raises BundleError."""
    try:
        _write(folder, bundle.manifest_json, bundle.files)
    except OSError as error:
        raise BundleError(f"{folder}: {error.strerror or error}") from error


def _write(folder: Path, manifest_json: bytes, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_bytes(manifest_json)


def read_bundle(folder: Path, bytes_max: int | None = None) -> Bundle:
    """Read and verify a bundle: the manifest's fields, every file's size and digest.

    Args:
        folder: with plain files only; a link is refused, as it may lead anywhere.
        bytes_max: refuse larger bundles before their files are read.

    Raises:
        BundleError: what is wrong, by name.
    """
    content = _read(folder / MANIFEST, MANIFEST_BYTES_MAX)
    manifest = parse_manifest(content, str(folder / MANIFEST))
    check_size(manifest, bytes_max)
    files = {}
    for name, entry in manifest.files.items():
        if "/" in name and (folder / name).parent.is_symlink():
            raise BundleError(f"{(folder / name).parent}: is no plain folder; a bundle holds no links")
        files[name] = _read(folder / name, entry.size_bytes)
        if len(files[name]) != entry.size_bytes:
            raise BundleError(f"{folder / name}: {len(files[name])} bytes, the manifest says {entry.size_bytes}")
        if sha256(files[name]) != entry.sha256:
            raise BundleError(f"{folder / name}: its digest is not the manifest's; the file was changed or damaged")
    return Bundle(manifest, content, sha256(content), files)


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest and check that it lists what every bundle has.

    Raises:
        BundleError: every field at fault, by name.
    """
    if len(content) > MANIFEST_BYTES_MAX:
        raise BundleError(f"{where}: {len(content)} bytes; a manifest has at most {MANIFEST_BYTES_MAX}")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise BundleError(f"{where}: {problems}") from error
    missing = [name for name in REQUIRED if name not in manifest.files]
    if missing:
        raise BundleError(f"{where} does not list {', '.join(missing)}")
    return manifest


def check_size(manifest: Manifest, bytes_max: int | None) -> None:
    """Raise BundleError when the files are larger together than allowed."""
    size = sum(entry.size_bytes for entry in manifest.files.values())
    if bytes_max is not None and size > bytes_max:
        raise BundleError(f"{manifest.ref} has {size:,} bytes, the limit is {bytes_max:,} (bundle_bytes_max)")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        return read_plain(path, bytes_max, follow_links=False)
    except UnfitFileError as error:
        raise BundleError(f"{path}: {error}") from error
    except OSError as error:
        reason = "is no plain file; a bundle holds no links" if error.errno == errno.ELOOP else error.strerror or error
        raise BundleError(f"{path}: {reason}") from error
