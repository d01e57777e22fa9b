from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from feature_client.embedded import EmbeddedStore
from feature_client.memory import MemoryStore
from feature_client.redis_store import RedisStore
from feature_client.store import Store, StoreConfigError


def open_store(url: str, *, read_only: bool = False) -> Store:
    """Return the store that a URL names, not yet started.

    `lmdb:///absolute/path` is a folder on this machine, `redis://[user:password@]host:port/db` (or `rediss://`) a Redis
    server, `memory://` an empty store in this process.

    Raises:
        StoreConfigError: the URL names no known store.
    """
    parts = urlsplit(url)
    match parts.scheme:
        case "lmdb":
            if parts.netloc or not parts.path.startswith("/"):
                raise StoreConfigError(f"an lmdb URL is lmdb:///absolute/path (three slashes), got {url!r}")
            return EmbeddedStore(Path(parts.path), read_only=read_only)
        case "redis" | "rediss":
            return RedisStore(url)
        case "memory":
            return MemoryStore()
    raise StoreConfigError(f"unknown feature store {url!r}; use lmdb:///path, redis://host:port/db or memory://")
