"""A client in another language, made from the .proto alone."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROTO = HERE.parent.parent / "proto" / "pinrank" / "v1" / "ranking.proto"

# CI has Node.js; where it lost it, these fail there instead of vanishing.
pytestmark = pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="needs Node.js and npm")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Install the client's two libraries beside a copy of it."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "rank.mjs"):
        shutil.copy(HERE / name, folder)
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=300)
    return folder / "rank.mjs"


async def call(client, server, request):
    process = await asyncio.create_subprocess_exec(
        "node", client, PROTO, f"127.0.0.1:{server.grpc_port}", json.dumps(request), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(output)


async def test_node_gets_a_ranking(client, server):
    request = {"user_id": "1", "pin_ids": [str(i) for i in range(1, 21)], "surface": "home", "explain": True}
    answer = await call(client, server, request)
    assert sorted(map(int, answer["pin_ids"])) == list(range(1, 21))
    assert answer["utilities"] == sorted(answer["utilities"], reverse=True)
    assert answer["explanation"]["heads"] == ["save", "hide"]
    assert answer["versions"]["model"] == "tiny"


async def test_node_gets_the_standard_status_of_a_bad_request(client, server):
    answer = await call(client, server, {"user_id": "1", "pin_ids": [], "surface": "shop"})
    assert answer["code"] == 3  # INVALID_ARGUMENT
    assert "no candidates" in answer["details"]
