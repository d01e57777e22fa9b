"""Live actions through the RPC: checked, stored once, and read by the next Rank call."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from feature_client.codec import encode_sequence
from feature_client.stores.store import StoreUnavailableError
from pinrank.v1 import activity_pb2, activity_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from server.api.activity import checked_actions
from tests import tiny

NOW_MS = int(time.time() * 1000)


def action(event_id, user_id=1, pin_id=7, name=None, **changes):
    fields = {
        "event_id": event_id, "user_id": user_id, "pin_id": pin_id, "action": name or tiny.ACTIONS.actions[0],
        "surface": tiny.ACTIONS.surfaces[0], "time_ms": NOW_MS + event_id,
    }  # fmt: skip
    return activity_pb2.Action(**(fields | changes))


@pytest.fixture
async def stubs(start_server):
    server = await start_server(record_actions=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield server, activity_pb2_grpc.ActivityServiceStub(channel), ranking_pb2_grpc.RankingServiceStub(channel)


async def utilities(ranking, user_id):
    request = ranking_pb2.RankRequest(user_id=user_id, pin_ids=range(1, 21), surface="home")
    response = await ranking.Rank(request)
    return dict(zip(response.pin_ids, response.utilities, strict=True)), response.degradation


async def test_an_action_changes_the_next_ranking_of_its_user_and_of_nobody_else(stubs):
    _, activity, ranking = stubs
    before = [(await utilities(ranking, user))[0] for user in (1, 2)]
    response = await activity.Record(activity_pb2.RecordRequest(actions=[action(i, pin_id=30 + i) for i in (1, 2, 3)]))
    assert (response.added, response.repeated_actions, response.too_old) == (3, 0, 0)
    after = [(await utilities(ranking, user))[0] for user in (1, 2)]
    assert after[0] != before[0]
    assert after[1] == before[1]


async def test_the_first_action_of_a_new_user_gives_a_sequence(stubs):
    _, activity, ranking = stubs
    assert (await utilities(ranking, 999))[1].sequence_missing
    await activity.Record(activity_pb2.RecordRequest(actions=[action(1, user_id=999)]))
    assert not (await utilities(ranking, 999))[1].sequence_missing


async def test_sent_again_it_changes_nothing_and_says_so(stubs):
    server, activity, ranking = stubs
    request = activity_pb2.RecordRequest(actions=[action(1), action(2)])
    await activity.Record(request)
    before = await utilities(ranking, 1)
    response = await activity.Record(request)
    assert (response.added, response.repeated_actions) == (0, 2)
    assert await utilities(ranking, 1) == before
    sample = server.metrics.registry.get_sample_value
    assert sample("pinrank_actions_total", {"outcome": "added"}) == 2
    assert sample("pinrank_actions_total", {"outcome": "repeated"}) == 2


async def test_a_stream_stores_all_its_messages(stubs):
    _, activity, _ = stubs

    async def messages():
        for start in range(0, 1000, 100):
            yield activity_pb2.RecordRequest(
                actions=[action(start + i + 1, user_id=100 + (start + i) % 50) for i in range(100)]
            )

    assert (await activity.RecordStream(messages())).added == 1000


async def test_bad_actions_are_named_field_by_field_and_nothing_is_stored(stubs):
    _, activity, ranking = stubs
    before = await utilities(ranking, 1)
    bad = [
        action(1), action(0), action(2, name="dance"), action(3, surface="moon"), action(4, time_ms=-1),
        action(5, time_ms=NOW_MS + 3_600_000), action(6, time_ms=NOW_MS // 1000), action(7, time_ms=NOW_MS * 1000),
    ]  # fmt: skip
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activity.Record(activity_pb2.RecordRequest(actions=bad))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    rpc_status.from_call(refused.value).details[0].Unpack(details)
    assert [violation.field for violation in details.field_violations] == [
        "actions[1].event_id", "actions[2].action", "actions[3].surface", "actions[4].time_ms", "actions[5].time_ms",
        "actions[6].time_ms", "actions[7].time_ms",
    ]  # fmt: skip
    assert "looks like seconds" in details.field_violations[5].description
    assert "looks like microseconds" in details.field_violations[6].description
    assert "known: " in details.field_violations[1].description
    assert await utilities(ranking, 1) == before


async def test_actions_in_the_future_that_were_stored_before_are_flagged_dropped_and_counted(stubs):
    server, activity, ranking = stubs
    poison = tiny.events([1] * 8, [0] * 8)
    poison["time_ms"], poison["event_id"] = NOW_MS * 1000, range(100, 108)
    await server.store.multi_put([(tiny.ACTIONS.key(1), encode_sequence(tiny.ACTIONS, poison))])
    assert (await utilities(ranking, 1))[1].foreign_values == 1
    assert (await activity.Record(activity_pb2.RecordRequest(actions=[action(1)]))).added == 1
    assert (await utilities(ranking, 1))[1].foreign_values == 0
    assert server.metrics.registry.get_sample_value("pinrank_future_actions_dropped_total") == 8


async def test_no_actions_are_no_error(stubs):
    assert (await stubs[1].Record(activity_pb2.RecordRequest())).added == 0


async def test_a_server_that_does_not_record_says_which_setting_does(start_server):
    server = await start_server()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await activity_pb2_grpc.ActivityServiceStub(channel).Record(activity_pb2.RecordRequest(actions=[action(1)]))
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "record_actions = true" in refused.value.details()


async def test_a_store_that_fails_is_unavailable_and_the_action_can_be_sent_again(stubs):
    server, activity, _ = stubs
    works = server.store.update

    async def fail(*_):
        raise StoreUnavailableError("told to fail")

    server.store.update = fail
    request = activity_pb2.RecordRequest(actions=[action(1)])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activity.Record(request)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    server.store.update = works
    assert (await activity.Record(request)).added == 1


async def test_ranking_and_recording_at_once_stay_correct(stubs):
    _, activity, ranking = stubs

    async def record(first):
        for number in range(first, first + 20):
            await activity.Record(activity_pb2.RecordRequest(actions=[action(number, user_id=4)]))

    async def rank():
        for _ in range(20):
            assert len((await utilities(ranking, 4))[0]) == 20

    await asyncio.gather(*(record(1 + 20 * i) for i in range(4)), *(rank() for _ in range(4)))
    response = await activity.Record(
        activity_pb2.RecordRequest(actions=[action(number, user_id=4) for number in range(1, 81)])
    )
    assert response.added == 0


def many(count, **changes):
    return activity_pb2.RecordRequest(actions=[action(i + 1, user_id=i, **changes) for i in range(count)])


async def test_other_calls_are_answered_between_the_slices_of_a_long_record(stubs):
    server, activity, ranking = stubs
    works, slices, answered = server.store.update, [], []

    async def note(keys, *rest):
        # No slice is written before a ranking was answered that was asked for after the slice before.
        answered.append(await utilities(ranking, 1))
        slices.append(len(keys))
        await works(keys, *rest)

    server.store.update = note
    assert (await activity.Record(many(1_000))).added == 1_000
    assert len(answered) == len(slices) == 16
    assert max(slices) <= 64


async def test_a_record_gives_the_event_loop_away_while_it_checks_thousands_of_actions(start_server):
    server = await start_server(record_actions=True)
    turns, checked = 0, asyncio.create_task(checked_actions(server.status.recorded, many(5_000).actions))
    while not checked.done():
        turns += 1
        await asyncio.sleep(0)
    users, _ = checked.result()
    assert len(users) == 5_000
    assert turns >= 5_000 // 256


async def test_a_refused_record_of_thousands_stores_nothing_and_counts_its_problems(stubs):
    _, activity, _ = stubs
    request = many(1_000)
    for i in range(500, 1_000):
        request.actions[i].time_ms = 0
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await activity.Record(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    rpc_status.from_call(refused.value).details[0].Unpack(details)
    found = [(violation.field, violation.description) for violation in details.field_violations]
    assert [field for field, _ in found] == [*(f"actions[{i}].time_ms" for i in range(500, 510)), ""]
    assert found[-1][1] == "490 more problems are not listed"
    assert (await activity.Record(many(1_000))).added == 1_000


async def test_unknown_actions_are_named_within_trailers_whatever_the_vocabulary(start_server):
    names = tuple(f"a_rather_long_action_{i:02}" for i in range(40))
    server = await start_server(record_actions=True)
    server.recording.write_into([tiny.changed(tiny.ACTIONS, actions=names)])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await activity_pb2_grpc.ActivityServiceStub(channel).Record(many(5, name="\u00e9" * 1_000))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    rpc_status.from_call(refused.value).details[0].Unpack(details)
    assert details.field_violations[0].field == "actions[0].action"
    assert "known: a_rather_long_action_00, " in details.field_violations[0].description
    assert "more" in details.field_violations[0].description


async def test_a_position_without_the_answer_it_is_in_is_refused(stubs):
    _, activity, ranking = stubs
    before = await utilities(ranking, 1)
    wrong = action(1, position=0)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await activity.Record(activity_pb2.RecordRequest(actions=[action(2), wrong]))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details() == (
        "actions[1].position: the position is in no answer; send its request_id, or no position"
    )
    assert await utilities(ranking, 1) == before
    response = await activity.Record(activity_pb2.RecordRequest(actions=[action(1, request_id=5, position=0)]))
    assert response.added == 1
