"""Opens model stores by URL."""

from __future__ import annotations

from pathlib import Path

from model_store.registry.bucket_objects import BucketObjects
from model_store.registry.folder_objects import FolderObjects
from model_store.registry.objects import ModelStoreError, Objects


def open_objects(url: str | Path) -> Objects:
    """Open `s3://bucket/prefix`, or a folder. Settings of a bucket come from the usual AWS_* variables."""
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return FolderObjects(Path(text))
    if scheme == "file":
        return FolderObjects(Path(text.removeprefix("file://")))
    if scheme == "s3":
        if "@" in text:
            raise ModelStoreError("model store s3://...: leave the keys out of the URL; AWS_* variables hold them")
        return BucketObjects(text)
    raise ModelStoreError(f"model store {text!r}: use a folder, or s3://bucket/prefix")
