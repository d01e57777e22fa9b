"""What the Redis stores do when a server, the network or a value is at fault: real servers, real connections."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from feature_client.codec import RowState
from feature_client.fetch import fetch
from feature_client.near_cache import near_caches
from feature_client.stores.open_store import open_store
from feature_client.stores.redis.node import CONNECT_TIMEOUT_S
from feature_client.stores.store import StoreConfigError, StoreUnavailableError
from tests import tiny
from tests.conftest import eventually
from tests.faulty_proxy import FaultyProxy
from tests.redis_servers import RedisServer, cluster, running
from tests.scripted_redis import ScriptedRedis, layout

PINS = np.arange(1, 9, dtype=np.uint64)


@pytest.fixture
def own_server(tmp_path):
    with running(tmp_path) as server:
        yield server


@pytest.fixture
async def proxy(redis_server):
    async with FaultyProxy(redis_server.port).running() as running_proxy:
        yield running_proxy


@pytest.fixture
async def proxied(proxy, redis_server):
    """A store behind the proxy that holds the tiny features."""
    redis_server.client().flushall()
    store = open_store(proxy.url)
    await store.start()
    await store.multi_put(tiny.features().items())
    yield store
    await store.close()


async def read(store, near=None, budget_s=5.0):
    return await fetch(store, tiny.manifest().needs, 1, PINS, budget_s=budget_s, near=near)


async def healthy_again(store, near=None):
    """Read until nothing is amiss, as traffic would; fails after ten seconds."""
    async with asyncio.timeout(10):
        while (fetched := await read(store, near)).store_unavailable:  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.01)
    return fetched


def node(store):
    (only,) = store.nodes.values()
    return only


async def test_a_server_that_starts_after_its_client_is_found(tmp_path):
    server = RedisServer(tmp_path)
    store = open_store(server.url)
    await store.start()
    assert (await read(store)).store_unavailable
    server.start()
    try:
        fetched = await healthy_again(store)
        assert fetched.missing().candidates == len(PINS), "it is empty"
    finally:
        server.kill()
        await store.close()


async def test_a_killed_server_costs_features_and_comes_back_empty(own_server):
    store = open_store(own_server.url)
    await store.start()
    await store.multi_put(tiny.features().items())
    near = near_caches((tiny.PINS,), 1 << 20, 0.0, outage_s=60.0)
    assert not (await read(store, near)).store_unavailable
    own_server.kill()
    fetched = await read(store, near)
    assert fetched.store_unavailable
    assert fetched.stale_rows == len(PINS)
    assert fetched.missing().candidates == 0, "aged rows stand in"
    assert fetched.candidate_rows("pin_core").tobytes() == tiny.pin_rows(PINS).tobytes()
    assert fetched.missing().user, "users are not cached: defaults stand in"
    own_server.start()
    fetched = await healthy_again(store, near)
    assert fetched.missing().candidates == len(PINS), "restarted empty: missing, and said so"
    assert fetched.stale_rows == 0
    await store.close()


async def test_commands_wait_for_a_server_that_pauses_for_longer_than_connecting_may_take(own_server):
    store = open_store(own_server.url)
    await store.start()
    await store.multi_put([(b"a", b"1")])
    own_server.client().client_pause(round(1.2e3 * CONNECT_TIMEOUT_S))
    assert await store.multi_get([b"a"]) == [b"1"]
    await store.close()


async def test_a_silent_server_costs_its_budget_a_few_times_and_then_nothing(proxy, proxied):
    assert not (await read(proxied)).store_unavailable
    proxy.silent = True
    for _ in range(3):
        assert (await read(proxied, budget_s=0.02)).store_unavailable
    counts = node(proxied).counts
    spared_before, reads_before = counts.spared, counts.reads
    for _ in range(50):
        assert (await read(proxied, budget_s=5.0)).store_unavailable
    assert counts.spared - spared_before >= 45, "the open circuit answers at once"
    assert counts.reads - reads_before <= 5
    proxy.silent = False
    proxy.refusing = True  # what was half-open is cut
    proxy.refusing = False
    assert (await healthy_again(proxied)).missing().candidates == 0


async def test_a_slow_server_is_left_alone_and_found_again(proxy, proxied):
    proxy.delay_s = 0.1
    for _ in range(3):
        assert (await read(proxied, budget_s=0.02)).store_unavailable
    assert node(proxied).breaker.open
    proxy.delay_s = 0.0
    assert (await healthy_again(proxied)).missing().candidates == 0
    assert not node(proxied).breaker.open


async def test_a_caller_without_time_left_is_no_failure_of_the_server(proxied):
    for _ in range(5):
        with pytest.raises(StoreUnavailableError, match="no time was left"):
            await proxied.multi_get([b"a"], timeout_s=0.0)
    assert not node(proxied).breaker.open
    assert not node(proxied).counts.failures


async def test_cut_connections_are_opened_again_within_the_next_reads(proxy, proxied):
    assert not (await read(proxied)).store_unavailable
    proxy.refusing = True
    assert (await read(proxied)).store_unavailable
    proxy.refusing = False
    assert (await healthy_again(proxied)).missing().candidates == 0


async def test_one_slow_answer_is_overtaken_by_a_second_read(proxy, proxied):
    for _ in range(200):  # until it knows how fast the server is
        await proxied.multi_get([b"a"])
    proxy.delay_s = 0.2
    slow = asyncio.create_task(proxied.multi_get(tiny.PINS.keys(PINS), timeout_s=5.0))
    await eventually(lambda: node(proxied).counts.hedged > 0)
    proxy.delay_s = 0.0
    assert len(await slow) == len(PINS)


async def test_hedges_are_a_small_part_of_all_reads_also_when_all_are_slow(proxy, proxied):
    proxy.delay_s = 0.002
    for _ in range(300):
        await proxied.multi_get([b"a"], timeout_s=5.0)
    proxy.delay_s = 0.03
    before = node(proxied).counts.reads
    for _ in range(60):
        await proxied.multi_get([b"a"], timeout_s=5.0)
    counts = node(proxied).counts
    assert counts.hedged <= 10 + 0.05 * counts.reads
    assert counts.reads - before == 60


async def test_readers_share_few_connections_and_all_are_answered(proxy, proxied):
    before = proxy.connections
    found = await asyncio.gather(*(proxied.multi_get(tiny.PINS.keys(PINS), timeout_s=10.0) for _ in range(300)))
    assert all(None not in values for values in found)
    assert proxy.connections - before <= 16


async def test_a_caller_that_hangs_up_leaves_no_answer_behind_for_the_next(proxy, proxied):
    proxy.delay_s = 0.05
    gone = [asyncio.create_task(proxied.multi_get(tiny.PINS.keys(PINS))) for _ in range(4)]
    await asyncio.sleep(0.01)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    proxy.delay_s = 0.0
    values = await proxied.multi_get(tiny.USERS.keys(np.array([1], np.uint64)))
    assert values == [tiny.features()[tiny.USERS.key(1)]]
    assert not node(proxied).breaker.open, "the callers gave up, not the server"


async def test_a_wrong_password_is_named_at_the_start_and_degrades_later(tmp_path):
    with running(tmp_path, "--requirepass", "right") as server:
        with pytest.raises(StoreConfigError, match="refused the user or password"):
            await open_store(f"redis://:wrong@127.0.0.1:{server.port}/0").start()
        with pytest.raises(StoreConfigError, match="refused the user or password"):
            await open_store(server.url).start()
        store = open_store(f"redis://:right@127.0.0.1:{server.port}/0")
        await store.start()
        await store.multi_put(tiny.features().items())
        client = server.client(password="right")
        client.config_set("requirepass", "changed")
        client.client_kill_filter(_type="normal", skipme=True)
        assert (await read(store)).store_unavailable
        client.config_set("requirepass", "right")
        assert (await healthy_again(store)).missing().candidates == 0
        await store.close()


async def test_an_acl_user_reads_what_it_may(tmp_path):
    with running(tmp_path) as server:
        server.client().execute_command("ACL", "SETUSER", "ranker", "on", ">secret", "~*", "+@read", "+ping")
        store = open_store(f"redis://ranker:secret@127.0.0.1:{server.port}/0")
        await store.start()
        assert await store.multi_get([b"a"]) == [None]
        with pytest.raises(StoreUnavailableError, match="failed a write"):
            await store.multi_put([(b"a", b"1")])
        await store.close()


def certificate(folder):
    """A certificate for 127.0.0.1, signed by itself: the files of it and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


async def test_rediss_speaks_tls_and_refuses_a_certificate_that_it_does_not_know(redis_server, tmp_path):
    known, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(known, key)
    redis_server.client().flushall()
    async with FaultyProxy(redis_server.port, tls).running() as proxy:
        store = open_store(f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={known}")
        await store.start()
        await store.multi_put([(b"a", b"1")])
        assert await store.multi_get([b"a"]) == [b"1"]
        await store.close()
        stranger = open_store(f"rediss://127.0.0.1:{proxy.port}/0")
        await stranger.start()
        with pytest.raises(StoreUnavailableError, match="certificate verify failed"):
            await stranger.multi_get([b"a"])
        await stranger.close()


async def test_values_cut_off_or_of_another_version_are_counted_and_never_read(proxied):
    keys = tiny.PINS.keys(PINS)
    good = await proxied.multi_get(keys)
    other = tiny.changed(tiny.PINS, version=9)
    await proxied.multi_put([(keys[0], good[0][:-3]), (keys[1], other.fingerprint + good[1][8:]), (keys[2], b"")])
    fetched = await read(proxied)
    assert fetched.missing().foreign == 5, "pins 1 and 2 are in the user's sequence too"
    assert fetched.missing().candidates == 3
    assert fetched.pins["pin_core"].states[:4].tolist() == [RowState.FOREIGN] * 3 + [RowState.PRESENT]


async def test_concurrent_misses_of_one_pin_are_read_once(proxy, proxied):
    near = near_caches((tiny.PINS,), 1 << 20, 60.0)
    before = node(proxied).counts.reads
    proxy.delay_s = 0.02
    found = await asyncio.gather(*(read(proxied, near, budget_s=5.0) for _ in range(10)))
    assert all(f.missing().candidates == 0 for f in found)
    # Ten for the users; the pins once.
    assert node(proxied).counts.reads - before <= 12
    assert not any(cache.flights for cache in near.values())


async def test_who_waits_for_anothers_read_reads_itself_when_that_one_is_given_up(proxy, proxied):
    near = near_caches((tiny.PINS,), 1 << 20, 60.0)
    proxy.delay_s = 0.05
    first = asyncio.create_task(read(proxied, near, budget_s=5.0))
    await eventually(lambda: any(cache.flights for cache in near.values()))
    second = asyncio.create_task(read(proxied, near, budget_s=5.0))
    await asyncio.sleep(0.06)
    first.cancel()
    assert (await second).missing().candidates == 0
    assert not any(cache.flights for cache in near.values())


async def test_a_cluster_that_loses_a_node_still_gives_the_others_keys_and_heals_by_failover(tmp_path):
    with cluster(tmp_path, replicas=1) as servers:
        store = open_store(f"redis+cluster://127.0.0.1:{servers[1].port}")
        await store.start()
        await store.multi_put(tiny.features().items())
        pins = np.arange(1, 51, dtype=np.uint64)
        keys = tiny.PINS.keys(pins)
        assert None not in await store.multi_get(keys)
        for server in servers[:3]:
            server.client().execute_command("WAIT", 1, 1000) if server is servers[0] else None
        servers[0].kill()
        with pytest.raises(StoreUnavailableError) as lost:
            await store.multi_get(keys, timeout_s=5.0)  # of the others; a killed one refuses at once
        values = lost.value.values
        assert 0 < len(lost.value.lost) < len(keys)
        assert all((value is None) == (i in set(lost.value.lost)) for i, value in enumerate(values))
        async with asyncio.timeout(20):
            while True:
                try:
                    values = await store.multi_get(keys, timeout_s=0.5)
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.05)
        assert values == [tiny.features()[key] for key in keys]
        await store.close()


async def test_slots_that_moved_are_followed(redis_cluster):
    for server in redis_cluster:
        server.client().flushall()
        server.client().config_resetstat()
    items = [(f"key:{i}".encode(), str(i).encode()) for i in range(200)]
    async with ScriptedRedis() as outdated:
        # As after a resharding that this client did not hear of: every key is asked of the wrong node.
        ports = [server.port for server in redis_cluster]
        outdated.answer = lambda command: layout(*ports[1:], ports[0]) if command[0] == b"CLUSTER" else None
        store = open_store(f"redis+cluster://127.0.0.1:{outdated.port}")
        await store.start()
        assert await store.multi_put(items) == 200
        assert await store.multi_get([key for key, _ in items], timeout_s=5.0) == [value for _, value in items]
        await store.close()
    for server in redis_cluster:
        assert server.client().info("errorstats")["errorstat_MOVED"]["count"] > 0


async def test_a_cluster_url_with_a_database_is_refused():
    with pytest.raises(StoreConfigError, match="a cluster only has database 0"):
        await open_store("redis+cluster://127.0.0.1:6379/7").start()


async def test_a_cluster_url_on_a_single_server_says_what_to_write(redis_server):
    with pytest.raises(StoreConfigError, match=r"is not a cluster .*use redis:// instead"):
        await open_store(f"redis+cluster://127.0.0.1:{redis_server.port}").start()
