from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from feature_client.stores.open_store import open_store
from feature_client.stores.store import Store
from tests.redis_servers import RedisServer


@pytest.fixture(params=["memory", "lmdb", "redis", "cluster"])
async def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Each kind of store in turn, started and empty."""
    url = {"memory": "memory://", "lmdb": f"lmdb://{tmp_path / 'store'}"}.get(request.param)
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        server.client().flushall()
        url = server.url
    elif request.param == "cluster":
        servers: list[RedisServer] = request.getfixturevalue("redis_cluster")
        for server in servers:
            server.client().flushall()
        url = f"redis+cluster://127.0.0.1:{servers[0].port}"
    assert url is not None
    store = open_store(url)
    await store.start()
    yield store
    await store.close()
