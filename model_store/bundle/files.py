"""Read and write bundles: `manifest.json` and the files that it lists, each verified by its digest."""

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
#: Optional: which requests of which surfaces explore, and how.
EXPLORATION = "explore.toml"
#: Optional: the embeddings that the model was trained on, to load into feature stores.
EMBEDDINGS = "embeddings.npz"
#: Optional: the network that makes the vectors of users, to compute their features.
USERS = "users.npz"
#: Optional: the distributions of inputs and predictions in training, to detect drift.
STATISTICS = "statistics.json"
#: Optional: the learned parameters of the network, to continue training from.
PARAMETERS = "parameters.npz"
REQUIRED = (NETWORK, UTILITY, GOLDEN)
#: Far more than any real manifest needs.
MANIFEST_BYTES_MAX = 4 << 20


class BundleError(Exception):
    """A bundle cannot be served. The message names the file or field at fault."""


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
        folder: created by this function; it must not exist yet.
        fields: all fields of the manifest except `files`.
        files: contents by name.
    """
    entries = {name: FileEntry(sha256=sha256(content), size_bytes=len(content)) for name, content in files.items()}
    manifest = Manifest(**{**fields, "files": entries})
    _write(folder, (manifest.model_dump_json(indent=2) + "\n").encode(), files)
    return manifest


def copy_out(bundle: Bundle, folder: Path) -> None:
    """Write a bundle, byte for byte as read, into a new folder. Raises BundleError."""
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
    """Read a bundle, and verify the manifest's fields and the size and digest of every file.

    Args:
        folder: must hold regular files only. Links are refused, as they can point anywhere.
        bytes_max: limit on the size of the bundle, checked before its files are read.

    Raises:
        BundleError: the bundle is invalid. The message names the file or field at fault.
    """
    content = _read(folder / MANIFEST, MANIFEST_BYTES_MAX)
    manifest = parse_manifest(content, str(folder / MANIFEST))
    check_size(manifest, bytes_max)
    files = {}
    for name, entry in manifest.files.items():
        if "/" in name and (folder / name).parent.is_symlink():
            raise BundleError(f"{(folder / name).parent} is a link; a bundle must not contain links")
        files[name] = _read(folder / name, entry.size_bytes)
        if len(files[name]) != entry.size_bytes:
            raise BundleError(f"{folder / name} has {len(files[name])} bytes, the manifest says {entry.size_bytes}")
        if sha256(files[name]) != entry.sha256:
            raise BundleError(
                f"{folder / name}: the digest differs from the manifest's; the file was changed or damaged"
            )
    return Bundle(manifest, content, sha256(content), files)


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest, and check that it lists every required file.

    Raises:
        BundleError: the manifest is invalid. The message names every field at fault.
    """
    if len(content) > MANIFEST_BYTES_MAX:
        raise BundleError(f"{where} has {len(content)} bytes, the limit is {MANIFEST_BYTES_MAX}")
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
    """Raise BundleError if the total size of the files exceeds `bytes_max`."""
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
        reason = (
            "it is a link; a bundle must not contain links" if error.errno == errno.ELOOP else error.strerror or error
        )
        raise BundleError(f"{path}: {reason}") from error
