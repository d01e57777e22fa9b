"""Open a feature store by its URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from feature_client.redaction import redacted
from feature_client.stores.lmdb_store import EmbeddedStore
from feature_client.stores.memory_store import MemoryStore
from feature_client.stores.redis.store import TIMEOUT_S, RedisStore
from feature_client.stores.store import Store, StoreConfigError


def open_store(
    url: str, *, read_only: bool = False, create: bool = True, lasting: bool = False, timeout_s: float = TIMEOUT_S
) -> Store:
    """Return the store that a URL names. It is not started yet.

    `lmdb:///absolute/path` names a folder on this machine, `redis://[user:password@]host:port/db` a Redis server,
    `redis+cluster://[user:password@]host:port` a Redis Cluster by any of its nodes, and `memory://` an empty store in
    this process. Use `rediss` for TLS. Options of redis-py can follow after `?`.

    Args:
        url: the URL.
        read_only: open an `lmdb` store for reading only.
        create: create an `lmdb` store that does not exist.
        lasting: refuse a store that ends with this process. Commands whose work other processes must see set this.
        timeout_s: the time limit of calls to Redis that set none of their own.

    Raises:
        StoreConfigError: the URL names no known kind of store, or a store that does not last although `lasting` is set.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # its message quotes the user and password
        raise StoreConfigError(
            f"the feature store URL {redacted(url)!r} is not valid: percent-encode special characters in the user and "
            "password, and put an IPv6 address in brackets"
        ) from None
    match parts.scheme:
        case "lmdb":
            if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
                raise StoreConfigError(
                    "an LMDB URL has the form lmdb:///absolute/path, with three slashes and with ? and # written as "
                    f"%3F and %23; got {redacted(url)!r}"
                )
            return EmbeddedStore(Path(unquote(parts.path)), read_only=read_only, create=create)
        case "redis" | "rediss" | "redis+cluster" | "rediss+cluster":
            return RedisStore(url, timeout_s=timeout_s)
        case "memory" if lasting:
            raise StoreConfigError(
                "a memory:// store ends with the process that opens it, so this command would find nothing in it and "
                "lose everything that it writes; use lmdb:///path, redis://host:port/db or redis+cluster://host:port"
            )
        case "memory":
            return MemoryStore()
    raise StoreConfigError(
        f"unknown feature store {redacted(url)!r}; use lmdb:///path, redis://host:port/db, redis+cluster://host:port "
        "or memory://"
    )
