"""The serving image's surroundings: no rights, no home, no name, read-only and full volumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from feature_client.stores.lmdb_store import EmbeddedStore
from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests import tiny
from tests.containers import Container

PINRANK = str(Path(sys.executable).with_name("pinrank"))


@pytest.fixture
async def volumes(tmp_path):
    """What an operator mounts: a model store and a filled feature store, both of another user."""
    tmp_path.chmod(0o755)
    store = EmbeddedStore(tmp_path / "features")
    await store.start()
    await store.multi_put(tiny.features().items())
    await store.close()
    models = open_model_store(tmp_path / "models")
    tiny.write_tiny_bundle(tmp_path / "bundle")
    models.publish(tmp_path / "bundle")
    models.set_label("tiny", "stable", 1)
    return tmp_path


def settings(volumes):
    return {
        "PINRANK_MODEL_STORE": str(volumes / "models"), "PINRANK_MODEL": "tiny", "PINRANK_LOG_FORMAT": "json",
        "PINRANK_FEATURE_STORE": f"lmdb://{volumes / 'features'}", "PINRANK_GRPC_PORT": "0", "PINRANK_HTTP_PORT": "0",
    }  # fmt: skip


def until_serving(process):
    """Read the log up to the event; return the events."""
    lines, events = [], []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("{"):
            events.append(json.loads(line))
            if events[-1]["event"] == "serving":
                return events
    pytest.fail("".join(lines))


def events_of_a_server_that_ranks(container, volumes):
    with container.running(PINRANK, "serve", folder=volumes, stderr=subprocess.PIPE) as process:
        events = until_serving(process)
        with grpc.insecure_channel(events[-1]["grpc"]) as channel:
            request = ranking_pb2.RankRequest(user_id=1, pin_ids=[10, 20, 30], surface="home")
            answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=10)
        assert sorted(answer.pin_ids) == [10, 20, 30]
        assert not answer.degradation.ListFields()
        process.terminate()
        assert process.wait(timeout=30) == 0
    return {event["event"]: event for event in events}


def test_the_docker_files_run_serves_and_says_that_the_store_has_no_lock(volumes):
    """User 10001 without a name, no HOME, read-only volumes and a read-only root."""
    mounted = [volumes / "models", volumes / "features"]
    container = Container(read_only=mounted, root_read_only=True, environment=settings(volumes))
    events = events_of_a_server_that_ranks(container, volumes)
    assert events["feature_store_without_lock"]["reason"] == "Permission denied"


def test_a_server_starts_and_ranks_on_volumes_without_a_free_block(volumes):
    (volumes / "tmp").mkdir()
    full = [volumes / name for name in ("models", "features", "tmp")]
    temporary = {"TMPDIR": str(volumes / "tmp")}
    events = events_of_a_server_that_ranks(
        Container(full=full, user=0, environment=settings(volumes) | temporary), volumes
    )
    assert events["feature_store_without_lock"]["reason"] == "No space left on device"


OPEN = """
import asyncio, sys
from pathlib import Path
from feature_client.stores.lmdb_store import EmbeddedStore
from feature_client.stores.store import StoreError

async def main(folder, mode):
    store = EmbeddedStore(Path(folder), read_only=mode == "read", create=False)
    try:
        await store.start()
        keys = [key async for page in store.scan() for key in page]
        values = await store.multi_get(keys)
        print(len(values), "values", all(values))
        if mode == "write":
            await store.multi_put((b"%d" % i, bytes(1000)) for i in range(10_000))
    except StoreError as error:
        print(error)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("lock_file", ["without blocks", "missing"])
def test_a_full_volume_is_read_and_a_writer_is_told(volumes, lock_file):
    """LMDB writes to its lock file through a map: on a full volume that was a bus error."""
    features = volumes / "features"
    if lock_file == "missing":
        (features / "lock.mdb").unlink()
    full = Container(full=[features], user=0)
    read = full.run(sys.executable, "-c", OPEN, str(features), "read", folder=volumes)
    assert f"{len(tiny.features())} values True" in read.stdout, (read.returncode, read.stderr)
    written = full.run(sys.executable, "-c", OPEN, str(features), "write", folder=volumes)
    assert "No space left on device; free space on its volume" in written.stdout, written.stderr


def test_a_volume_that_becomes_full_fails_the_write_and_keeps_what_is_there(volumes):
    features = volumes / "features"
    full = Container(full=[features], user=0)
    make_room = f"rm {features}/.fills; head -c 800000 /dev/zero > {features}/.fills"
    twice = f'{make_room}; "$@" write; exec "$@" read'
    done = full.run("sh", "-c", twice, "sh", sys.executable, "-c", OPEN, str(features), folder=volumes)
    before, failed, after = done.stdout.splitlines()
    assert "failed to write" in failed
    assert before == after == f"{len(tiny.features())} values True"


@pytest.mark.parametrize(
    ("hidden", "mode", "said"),
    [
        ("data.mdb", "read", "not allowed to read"),
        ("", "read", "Permission denied"),
        (None, "write", "set record_actions = false"),
    ],
)
def test_what_the_user_may_not_do_with_a_store_is_said(volumes, hidden, mode, said):
    features = volumes / "features"
    if hidden is not None:
        (features / hidden).chmod(0o600)
    refused = Container().run(sys.executable, "-c", OPEN, str(features), mode, folder=volumes)
    assert said in refused.stdout, refused.stderr
    assert "10001" in refused.stdout or not hidden
    assert str(features) in refused.stdout
