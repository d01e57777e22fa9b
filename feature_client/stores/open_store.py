from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from feature_client.redaction import redacted
from feature_client.stores.lmdb_store import EmbeddedStore
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.redis.store import RedisStore
from feature_client.stores.store import Store, StoreConfigError


def open_store(url: str, *, read_only: bool = False, create: bool = True, lasting: bool = False) -> Store:
    """Return the store that a URL names, not yet started.

    `lmdb:///absolute/path` is a folder on this machine, `redis://[user:password@]host:port/db` a Redis server,
    `redis+cluster://[user:password@]host:port` a Redis Cluster by any of its nodes (`rediss` for TLS; redis-py's
    options after `?`), `memory://` an empty store in this process.

    Args:
        url: which.
        read_only: an `lmdb` store takes no writes.
        create: whether an `lmdb` store that does not exist is created.
        lasting: refuse a store that ends with this process: for commands whose work other processes shall see.

    Raises:
        StoreConfigError: the URL names no known store, or one that does not last.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # its text quotes user and password
        raise StoreConfigError(
            f"the feature store's URL {redacted(url)!r} cannot be read: percent-encode special characters of user and "
            "password, and put an IPv6 address into brackets"
        ) from None
    match parts.scheme:
        case "lmdb":
            if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
                raise StoreConfigError(
                    "an lmdb URL is lmdb:///absolute/path: three slashes, `?` and `#` as %3F and %23; got "
                    f"{redacted(url)!r}"
                )
            return EmbeddedStore(Path(unquote(parts.path)), read_only=read_only, create=create)
        case "redis" | "rediss" | "redis+cluster" | "rediss+cluster":
            return RedisStore(url)
        case "memory" if lasting:
            raise StoreConfigError(
                "a memory:// store ends with the process that opens it, so this command has nothing to read there and "
                "would lose what it writes; use lmdb:///path, redis://host:port/db or redis+cluster://host:port"
            )
        case "memory":
            return MemoryStore()
    raise StoreConfigError(
        f"unknown feature store {redacted(url)!r}; use lmdb:///path, redis://host:port/db, redis+cluster://host:port or memory://"
    )
