"""A Redis whose place another takes, by plan or not, is followed without a restart: real servers, a name that moves."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from structlog.testing import capture_logs

from feature_client.action_times import clock_ms
from feature_client.activity.stream import StreamFollower
from feature_client.activity.writer import ActionOutcome, write_events
from feature_client.stores.open_store import open_store
from feature_client.stores.redis.replies import MEANINGS
from feature_client.stores.redis.slots import slots_of
from feature_client.stores.redis.store import RedisStore
from feature_client.stores.store import StoreUnavailableError
from tests import tiny
from tests.moving_name import NAME, MovingName
from tests.redis_servers import RedisServer, running, wait_until
from tests.scripted_redis import ScriptedRedis, layout

USER = np.array([1], np.uint64)


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory):
    with (
        running(tmp_path_factory.mktemp("one"), "--repl-diskless-sync-delay", "0") as one,
        running(tmp_path_factory.mktemp("two"), "--repl-diskless-sync-delay", "0") as two,
    ):
        yield one, two


@pytest.fixture
def pair(two_servers):
    """A primary that is empty, and its replica."""
    primary, replica = two_servers
    primary.client().replicaof("NO", "ONE")
    primary.client().flushall()
    make_replica(replica, of=primary)
    return primary, replica


def make_replica(server: RedisServer, of: RedisServer) -> None:
    server.client().replicaof("127.0.0.1", of.port)
    wait_until(lambda: server.client().info("replication")["master_link_status"] == "up")


def fail_over(old: RedisServer, new: RedisServer) -> None:
    """As planned: the replica takes over, the old primary becomes its replica. The name has yet to move."""
    old.client().wait(1, 10_000)
    new.client().replicaof("NO", "ONE")
    make_replica(old, of=new)


@pytest.fixture
def name(monkeypatch, pair):
    """Leads to the primary."""
    moving = MovingName(monkeypatch)
    moving.port = pair[0].port
    return moving


@contextlib.asynccontextmanager
async def started(store):
    await store.start()
    try:
        yield store
    finally:
        await store.close()


def node(store):
    (only,) = store.nodes.values()
    return only


async def record(store, number):
    return (await write_events(store, tiny.ACTIONS, USER, tiny.events([number], [0]), clock_ms())).outcomes


async def test_the_first_write_after_a_planned_failover_goes_to_the_new_primary(pair, name):
    async with started(open_store(name.url)) as store:
        assert await record(store, 1) == [ActionOutcome.ADDED]
        fail_over(*pair)
        name.port = pair[1].port
        assert await record(store, 2) == [ActionOutcome.ADDED]
        assert not node(store).counts.failures
        await store.multi_put([(b"a", b"of the new one")])
        assert pair[1].client().get(b"a") == b"of the new one"


async def test_until_the_name_moves_writes_say_why_they_fail_and_reads_go_on(pair, name):
    async with started(open_store(name.url)) as store:
        await store.multi_put([(b"a", b"1")])
        fail_over(*pair)
        for _ in range(5):
            with pytest.raises(StoreUnavailableError, match="READONLY, it is a replica now and accepts no writes"):
                await store.multi_put([(b"a", b"2")])
            assert await store.multi_get([b"a"]) == [b"1"]
        assert not node(store).breaker.open
        name.port = pair[1].port
        assert await store.multi_put([(b"a", b"2")]) == 1


async def test_after_a_write_found_the_new_primary_reads_go_there_too(pair, name):
    async with started(open_store(name.url)) as store:
        await asyncio.gather(*(store.multi_get([b"a"]) for _ in range(8)))  # connections that lie idle
        pair[1].client().replicaof("NO", "ONE")
        pair[0].client().replicaof("127.0.0.1", 1)  # a replica of nobody: what it has stays as it is
        name.port = pair[1].port
        await store.multi_put([(b"a", b"new")])
        found = await asyncio.gather(*(store.multi_get([b"a"]) for _ in range(16)))
        assert found == [[b"new"]] * 16


async def test_a_server_that_goes_on_answering_is_left_when_its_name_moved(pair, name):
    pair[1].client().replicaof("NO", "ONE")
    pair[1].client().set(b"a", b"new")
    pair[0].client().set(b"a", b"old")
    async with started(RedisStore(name.url, age_max_s=0.05)) as store:
        assert await store.multi_get([b"a"]) == [b"old"]
        name.port = pair[1].port
        await until_read(store, b"new")
        assert not node(store).counts.failures


async def until_read(store, value):
    async with asyncio.timeout(10):
        while await store.multi_get([b"a"]) != [value]:  # noqa: ASYNC110 - the store finds it by itself
            await asyncio.sleep(0.005)


async def test_while_names_cannot_be_looked_up_the_old_connection_is_kept(pair, name):
    pair[0].client().set(b"a", b"old")
    async with started(RedisStore(name.url, age_max_s=0.02)) as store:
        assert await store.multi_get([b"a"]) == [b"old"]
        name.port, before = None, name.lookups
        async with asyncio.timeout(10):
            while name.lookups < before + 3:
                assert await store.multi_get([b"a"]) == [b"old"]
                await asyncio.sleep(0.005)
        assert not node(store).counts.failures
        name.port = pair[1].port
        pair[1].client().replicaof("NO", "ONE")
        pair[1].client().set(b"a", b"new")
        await until_read(store, b"new")


async def test_followers_go_on_at_the_new_primary(pair, name):
    async with started(open_store(name.url)) as store:
        one = StreamFollower(name.url, "s", "fold", "one", store, tiny.ACTIONS)
        stop = asyncio.Event()
        following = asyncio.create_task(one.follow(stop))
        send(pair[0], 1)
        await until(lambda: one.counts.added == 1)
        fail_over(*pair)
        name.port = pair[1].port
        send(pair[1], 2)
        await until(lambda: one.counts.added == 2)
        stop.set()
        await following


def send(server, number):
    fields = {"event_id": number, "user_id": 1, "pin_id": number, "time_ms": 1_700_000_000_000 + number}
    server.client().xadd("s", fields | {"action": tiny.ACTIONS.actions[0], "surface": tiny.ACTIONS.surfaces[0]})


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.01)


#: By code: whether the connection is dropped, and whether the circuit breaker hears of it.
ERRORS = {
    "READONLY": (True, False),
    "NOREPLICAS": (True, False),
    "UNBLOCKED": (True, False),
    "MASTERDOWN": (True, True),
    "LOADING": (True, True),
    "NOAUTH": (True, True),
    "WRONGPASS": (True, True),
    "BUSY": (False, True),
    "CLUSTERDOWN": (False, False),
    "TRYAGAIN": (False, False),
    "CROSSSLOT": (False, False),
    "MISCONF": (False, False),
    "OOM": (False, False),
    "NOPERM": (False, False),
    "WRONGTYPE": (False, False),
    "NOSCRIPT": (False, False),
    "EXECABORT": (False, False),
    "BUSYGROUP": (False, False),
    "NOGROUP": (False, False),
    "ERR": (False, False),
    "SOMETHINGNEW": (False, False),
}


@pytest.mark.parametrize(("setting", "on", "off", "code"), [
    ("maxmemory", 1, 0, "OOM"),
    ("min-replicas-to-write", 5, 0, "NOREPLICAS"),
])  # fmt: skip
async def test_a_server_that_takes_no_writes_says_why_also_from_a_script(pair, setting, on, off, code):
    client = pair[0].client()
    async with started(open_store(pair[0].url)) as store:
        client.config_set(setting, on)
        try:
            with pytest.raises(StoreUnavailableError, match=code):
                await record(store, 1)
            assert await store.multi_get([b"a"]) == [None]
        finally:
            client.config_set(setting, off)
        assert await record(store, 1) == [ActionOutcome.ADDED]


def test_the_table_of_errors_is_whole():
    assert set(MEANINGS) <= {*ERRORS, "MOVED", "ASK"}


@pytest.mark.parametrize("code", ERRORS)
async def test_an_error_drops_the_connection_or_opens_the_circuit_as_the_table_says(code):
    dropped, heard = ERRORS[code]
    async with ScriptedRedis() as server, started(open_store(server.url)) as store:
        await store.multi_put([(b"a", b"1")])
        server.commands.clear()
        server.asked_on.clear()
        server.answer = lambda command: b"-%b a secret of a user\r\n" % code.encode() if command[0] == b"MSET" else None
        with pytest.raises(StoreUnavailableError) as told:
            await store.multi_put([(b"a", b"1")])
        assert "secret" not in str(told.value)
        tried = [on for on, command in zip(server.asked_on, server.commands, strict=True) if command[0] == b"MSET"]
        assert len(set(tried)) == len(tried) == (2 if dropped else 1), "once more, on a new connection"
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                await store.multi_put([(b"a", b"1")])
        assert node(store).breaker.open == heard


@pytest.mark.parametrize("error", [b"MOVED 5 10.0.0.1:7000", b"CROSSSLOT Keys in request don't hash to the same slot"])
async def test_a_server_that_is_a_cluster_says_which_url_to_use(error):
    async with ScriptedRedis() as server, started(open_store(server.url)) as store:
        server.answer = lambda command: b"-%b\r\n" % error if command[0] == b"MGET" else None
        with pytest.raises(StoreUnavailableError, match=r"use redis\+cluster://"):
            await store.multi_get([b"a"])


class Cluster:
    """Servers that say of themselves what the test says."""

    def __init__(self, servers):
        self.servers = servers
        self.layout = b""
        for server in servers:
            server.answer = self.answer

    def answer(self, command):
        return self.layout if command[0] == b"CLUSTER" else None


@pytest.fixture
async def scripted(monkeypatch):
    """Three nodes of which the name leads to the first."""
    async with ScriptedRedis() as a, ScriptedRedis() as b, ScriptedRedis() as c:
        moving = MovingName(monkeypatch)
        moving.port = a.port
        cluster = Cluster([a, b, c])
        cluster.layout = layout(a.port, b.port)
        yield cluster, moving


def cluster_store(name, age_max_s=0.05):
    return RedisStore(name.url.replace("redis://", "redis+cluster://"), age_max_s=age_max_s)


KEYS = [b"key:%d" % i for i in range(50)]


async def test_a_layout_that_changed_unnoticed_is_read_again_and_nodes_that_left_are_closed(scripted):
    cluster, name = scripted
    a, b, c = cluster.servers
    async with started(cluster_store(name)) as store:
        await store.multi_get(KEYS)
        assert set(store.nodes) == {f"{NAME}:6379", f"127.0.0.1:{a.port}", f"127.0.0.1:{b.port}"}
        cluster.layout = layout(a.port, c.port)  # the second goes on answering as if it were its
        async with asyncio.timeout(10):
            while f"127.0.0.1:{c.port}" not in store.nodes:
                await store.multi_get(KEYS)
                await asyncio.sleep(0.01)
        assert set(store.nodes) == {f"{NAME}:6379", f"127.0.0.1:{a.port}", f"127.0.0.1:{c.port}"}
        asked = len(b.commands)
        await store.multi_get(KEYS)
        assert len(b.commands) == asked


async def test_all_nodes_replaced_are_found_by_the_name_of_the_url(scripted):
    cluster, name = scripted
    a, b, c = cluster.servers
    async with started(cluster_store(name)) as store:
        await store.multi_get(KEYS)
        cluster.layout = layout(c.port)
        name.port = c.port
        for gone in (a, b):
            await gone.stop()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await store.multi_get(KEYS, timeout_s=0.5) == [None] * len(KEYS)
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.01)
        assert set(store.nodes) == {f"{NAME}:6379", f"127.0.0.1:{c.port}"}


def looked(cluster):
    return sum(command[0] == b"CLUSTER" for server in cluster.servers for command in server.commands)


async def test_a_cluster_that_is_gone_and_comes_back_is_logged_once_each(scripted):
    cluster, name = scripted
    async with started(cluster_store(name, age_max_s=0)) as store:
        await store.multi_get(KEYS)
        answers = [server.answer for server in cluster.servers]
        with capture_logs() as logs:
            for server in cluster.servers:
                server.answer = lambda command: b"-ERR gone\r\n"
            looks = looked(cluster)
            while looked(cluster) <= looks + 2 * 6:  # two whole looks: each asks three nodes, and each of them twice
                with pytest.raises(StoreUnavailableError):
                    await store.multi_get(KEYS)
                await asyncio.sleep(0.01)
            for server, answer in zip(cluster.servers, answers, strict=True):
                server.answer = answer
            async with asyncio.timeout(10):
                while logs[-1]["event"] != "redis_cluster_layout_known":
                    with contextlib.suppress(StoreUnavailableError):  # circuits are open for a moment yet
                        await store.multi_get(KEYS)
                    await asyncio.sleep(0.01)
        told = [line["event"] for line in logs if line["event"].startswith("redis_cluster")]
        assert told == ["redis_cluster_layout_unknown", "redis_cluster_layout_known"]


async def test_a_cluster_of_which_no_node_answers_is_no_empty_store(scripted):
    cluster, name = scripted
    for server in cluster.servers:
        await server.stop()
    async with started(cluster_store(name)) as store:
        with pytest.raises(StoreUnavailableError, match="no node of the Redis Cluster"):
            _ = [keys async for keys in store.scan()]


async def test_a_node_that_names_ever_more_nodes_is_stopped(scripted):
    cluster, name = scripted
    ports = iter(range(20_000, 60_000))
    async with started(cluster_store(name, age_max_s=60)) as store:
        for server in cluster.servers:
            server.answer = lambda command: b"-MOVED 5 127.0.0.1:%d\r\n" % next(ports) if command[0] == b"GET" else None
        with pytest.raises(StoreUnavailableError, match=r"ever more nodes|failed"):
            await store.multi_get([b"key:%d" % i for i in range(200)])
        assert len(store.nodes) < 30


async def test_reads_and_writes_of_a_slot_on_its_way_follow_it(redis_cluster):
    key = next(b"key:%d" % i for i in range(100) if slots_of([b"key:%d" % i])[0] < 5_000)
    slot = int(slots_of([key])[0])
    source, target = (server.client() for server in redis_cluster[:2])
    source_id, target_id = (client.execute_command("CLUSTER MYID") for client in (source, target))
    async with started(open_store(f"redis+cluster://127.0.0.1:{redis_cluster[2].port}")) as store:
        await store.multi_put([(key, b"1")])
        source.delete(key)
        target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
        source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
        try:
            await store.multi_put([(key, b"2")])
            assert await store.multi_get([key]) == [b"2"]
            await store.update([key], lambda _, before: [before[0] + b"3"])
            assert await store.multi_get([key]) == [b"23"]
        finally:
            target.execute_command("ASKING")
            for client in (target, source):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", source_id)


async def test_a_key_that_holds_no_string_is_missing_and_costs_no_other_key(redis_cluster):
    async with started(open_store(f"redis+cluster://127.0.0.1:{redis_cluster[0].port}")) as store:
        await store.multi_put([(key, key) for key in KEYS])
        await store.ask(b"a stream", "XADD", b"a stream", "*", "a", "b")
        assert await store.multi_get([*KEYS, b"a stream"]) == [*KEYS, None]
