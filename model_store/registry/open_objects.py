"""Open the folder or bucket of a model store by its URL."""

from __future__ import annotations

from pathlib import Path

from model_store.registry.bucket_objects import BucketObjects
from model_store.registry.folder_objects import FolderObjects
from model_store.registry.objects import ModelStoreError, Objects


def open_objects(url: str | Path) -> Objects:
    """Open a folder or `s3://bucket/prefix`. Buckets are configured by the usual AWS_* variables."""
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return FolderObjects(Path(text))
    if scheme == "file":
        return FolderObjects(Path(text.removeprefix("file://")))
    if scheme == "s3":
        if "@" in text:
            raise ModelStoreError("model store s3://...: remove the keys from the URL and set them in AWS_* variables")
        return BucketObjects(text)
    raise ModelStoreError(f"model store {text!r}: use a folder, or s3://bucket/prefix")
