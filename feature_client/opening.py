from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from feature_client.embedded import EmbeddedStore
from feature_client.memory import MemoryStore
from feature_client.redis_store import RedisStore
from feature_client.store import Store, StoreConfigError


def redacted(url: str) -> str:
    """Return a store's URL without user, password and options, for logs and messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_store(url: str, *, read_only: bool = False) -> Store:
    """Return the store that a URL names, not yet started.

    `lmdb:///absolute/path` is a folder on this machine, `redis://[user:password@]host:port/db` (or `rediss://`) a Redis
    server, `memory://` an empty store in this process.

    Raises:
        StoreConfigError: the URL names no known store.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreConfigError(f"the feature store's URL cannot be read: {error}") from error
    match parts.scheme:
        case "lmdb":
            if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
                raise StoreConfigError(
                    f"an lmdb URL is lmdb:///absolute/path: three slashes, `?` and `#` as %3F and %23; got {url!r}"
                )
            return EmbeddedStore(Path(unquote(parts.path)), read_only=read_only)
        case "redis" | "rediss":
            return RedisStore(url)
        case "memory":
            return MemoryStore()
    raise StoreConfigError(
        f"unknown feature store {redacted(url)!r}; use lmdb:///path, redis://host:port/db or memory://"
    )
