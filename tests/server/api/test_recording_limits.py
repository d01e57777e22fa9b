"""What callers may write, through a real server: rates, ages, the size of the store, and how long it is kept."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from pydantic import SecretStr

from feature_client.activity.writer import write_events
from feature_client.codec import decode_sequence
from feature_client.stores.lmdb_store import EmbeddedStore
from pinrank.v1 import activity_pb2, activity_pb2_grpc
from server.request.recording import _COUNT_S
from tests import tiny
from tests.conftest import eventually

DAY_MS = 86_400_000


def action(event_id, user_id=1, age_ms=0, pin_id=7):
    return activity_pb2.Action(
        event_id=event_id, user_id=user_id, pin_id=pin_id, action=tiny.ACTIONS.actions[1],
        surface=tiny.ACTIONS.surfaces[0], time_ms=int(time.time() * 1e3) - age_ms,
    )  # fmt: skip


def call(*actions):
    return activity_pb2.RecordRequest(actions=actions)


@pytest.fixture
async def recording(start_server):
    """Start servers that record, with changed settings; return one and a stub."""
    channels = []

    async def start(**changes):
        server = await start_server(record_actions=True, **changes)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}"))
        return server, activity_pb2_grpc.ActivityServiceStub(channels[-1])

    yield start
    for channel in channels:
        await channel.close()


def pushback_ms(error):
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])


async def events_of(server, user):
    (value,) = await server.store.multi_get([tiny.ACTIONS.key(user)])
    return decode_sequence(tiny.ACTIONS, value)[0]["event_id"].tolist()


async def test_actions_of_too_many_new_users_are_refused_and_those_of_known_users_go_in(recording):
    server, activity = await recording(record_new_users_per_s=1e-6)  # one at once
    response = await activity.Record(call(*(action(1, user) for user in (900, 1, 901, 2, 902))))
    assert (response.added, response.refused_new_users, response.refused_too_many) == (3, 2, 0)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activity.Record(call(action(2, 903), action(3, 904)))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert pushback_ms(refused.value) == 1_000
    assert refused.value.details() == (
        "2 actions are of users without a sequence, and the server admits no more now (record_new_users_per_s = 1e-06, "
        "record_values_max = 0); nothing was stored, send the call again later"
    )
    assert (await activity.Record(call(action(2, 900), action(2, 2)))).added == 2
    assert server.metrics.value("pinrank_actions_total", outcome="refused_new_user") == 4
    assert [await events_of(server, user) for user in (900, 901, 903)] == [[1, 2], [], []]


async def test_invented_users_do_not_grow_the_store_beyond_the_rate(recording):
    server, activity = await recording(record_new_users_per_s=5.0)
    before, start_s, added, refused = await server.store.count(), time.monotonic(), 0, []
    for first in range(1_000, 21_000, 1_000):
        try:
            added += (await activity.Record(call(*(action(1, first + i) for i in range(1_000))))).added
        except grpc.aio.AioRpcError as error:
            refused.append(error.code())
    assert set(refused) <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    grown = await server.store.count() - before
    assert grown == added
    assert 50 <= grown <= 50 + 5 * (time.monotonic() - start_s + 1)


async def test_one_caller_cannot_replace_a_users_sequence_at_once(recording):
    """110 hides of one user, each at another time: a sequence of 8 keeps what ten seconds admit."""
    server, activity = await recording(record_user_actions_per_s=0.3)
    hides = [action(number, user_id=3, age_ms=number * 3_600_000) for number in range(1, 111)]
    start_s, response = time.monotonic(), await activity.Record(call(*hides))
    added = response.added
    assert 3 <= added <= 3 + 0.3 * (time.monotonic() - start_s + 1)
    assert (added + response.refused_too_many + response.too_old, response.refused_new_users) == (110, 0)
    assert response.refused_too_many >= 5
    sequence = await events_of(server, 3)
    assert (len(sequence), sequence.count(0)) == (2 + added, 2), "what was loaded is still there"
    response = await activity.Record(call(*hides, action(1, user_id=2)))
    assert response.repeated_actions == added
    assert response.added >= 1
    assert server.metrics.value("pinrank_actions_total", outcome="refused_too_many") >= 10


async def test_a_call_of_a_busy_user_alone_is_refused_and_names_the_setting(recording):
    _, activity = await recording(record_user_actions_per_s=1e-6)
    assert (await activity.Record(call(action(1)))).added == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activity.Record(call(action(2)))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "record_user_actions_per_s = 1e-06" in refused.value.details()
    assert (await activity.Record(call(action(1)))).repeated_actions == 1


async def test_a_stream_stores_what_the_limits_admit_and_counts_the_rest(recording):
    _, activity = await recording(record_new_users_per_s=1e-6)

    async def messages():
        for user in (900, 901, 1):
            yield call(action(1, user))

    response = await activity.RecordStream(messages())
    assert (response.added, response.refused_new_users) == (2, 1)


async def test_an_action_older_than_the_retention_is_refused_and_a_higher_one_admits_it(recording):
    _, activity = await recording(record_retention_days=30)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activity.Record(call(action(1), action(2, age_ms=31 * DAY_MS)))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "actions[1].time_ms: " in refused.value.details()
    assert "older than the 30 days for which sequences are kept; raise record_retention_days" in refused.value.details()
    assert (await activity.Record(call(action(1, age_ms=29 * DAY_MS)))).added == 1


async def test_without_a_retention_old_logs_can_be_recorded(recording):
    server, activity = await recording(record_retention_days=0)
    assert (await activity.Record(call(action(1, user_id=900, age_ms=9_000 * DAY_MS)))).added == 1
    assert server.recording.sweeper is None


async def test_a_store_with_too_many_values_admits_no_new_users_until_it_has_room(recording, monkeypatch):
    assert _COUNT_S <= 10
    monkeypatch.setattr("server.request.recording._COUNT_S", 0.01)
    values = len(tiny.features())
    server, activity = await recording(record_values_max=values + 2)
    assert (await activity.Record(call(action(1, 900), action(1, 901)))).added == 2
    await eventually(lambda: server.status.recorded[0].limits.full)
    response = await activity.Record(call(action(1, 902), action(1, 1)))
    assert (response.added, response.refused_new_users) == (1, 1)
    # A version that reads another sequence is loaded: its limits are the same.
    server.recording.write_into([tiny.changed(tiny.ACTIONS, version=9), tiny.ACTIONS])
    assert [one.limits.full for one in server.recording.sequences] == [True, True]
    await server.store.sweep(tiny.ACTIONS.key_prefix, tiny.ACTIONS.key(900), 1, lambda _: True)
    await eventually(lambda: not server.status.recorded[0].limits.full)
    assert any(line.startswith("store-size: running") for line in server.status.lines())


async def test_sequences_that_are_over_are_swept_and_counted(recording, tmp_path: Path):
    store = EmbeddedStore(tmp_path / "features")
    await store.start()
    old = tiny.events([7], [0])
    old["event_id"], old["time_ms"] = 1, int(time.time() * 1e3) - 91 * DAY_MS
    for user in (900, 901):
        await write_events(store, tiny.ACTIONS, np.array([user], np.uint64), old, int(time.time() * 1e3))
    await store.close()
    server, activity = await recording()
    swept = lambda outcome: server.metrics.value("pinrank_swept_sequences_total", outcome=outcome)  # noqa: E731
    await eventually(lambda: swept("deleted") == 2)
    assert swept("kept") == 4  # loaded in bulk, and years old
    assert [await events_of(server, user) for user in (900, 901)] == [[], []]
    assert any(line.startswith("recorded-sequences: running") for line in server.status.lines())
    assert (await activity.Record(call(action(2, 900)))).added == 1


async def test_a_server_that_does_not_record_sweeps_nothing(start_server):
    server = await start_server()
    assert server.metrics.value("pinrank_swept_sequences_total", outcome="deleted") is None
    assert not any(line.startswith("recorded-sequences") for line in server.status.lines())


@pytest.mark.parametrize("kind", ["redis", "cluster"])
async def test_redis_ends_what_a_server_recorded(recording, kind, request):
    servers = [request.getfixturevalue("redis_server")] if kind == "redis" else request.getfixturevalue("redis_cluster")
    clients = [server.client() for server in servers]
    for client in clients:
        client.flushall()
    url = servers[0].url if kind == "redis" else f"redis+cluster://127.0.0.1:{servers[0].port}"
    server, activity = await recording(feature_store=SecretStr(url), record_retention_days=3, labels=("stable",))
    await server.store.multi_put(tiny.features().items())
    assert (await activity.Record(call(action(1, 900), action(1, 2)))).added == 2
    ends = {key: client.pttl(key) for client in clients for key in client.keys(tiny.ACTIONS.key_prefix + b"*")}
    for user in (900, 2):
        assert 0.99 * 3 * DAY_MS < ends[tiny.ACTIONS.key(user)] <= 3 * DAY_MS
    assert ends[tiny.ACTIONS.key(1)] == -1
    assert server.recording.sweeper is None


async def test_what_a_limit_refuses_is_not_in_the_impression_log(logging):
    _, frontend, rows = await logging(record_new_users_per_s=1e-6)
    response = await frontend.activity.Record(call(action(1, 900), action(2, 901), action(3, 1)))
    assert (response.added, response.refused_new_users) == (2, 1)
    with pytest.raises(grpc.aio.AioRpcError):
        await frontend.activity.Record(call(action(4, 902)))
    assert [row["event_id"] for row in await rows("actions")] == [1, 3]
