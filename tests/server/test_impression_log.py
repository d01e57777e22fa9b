"""The impression log of a server: what it answered, over real calls, in real files."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter

import grpc
import grpc.aio
import numpy as np
import pytest

from impressions.dataset import read_requests, read_slates
from impressions.joining.attribution import Window
from impressions.joining.join import Wanted, join_log
from impressions.reading import read_tables
from impressions.segments import Segment
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engines import engine_factory
from model_store.bundle.golden import decode_golden
from model_store.exploration.table import load_exploration
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate
from model_store.model.utility import load_utility
from pinrank.v1 import activity_pb2, impressions_pb2, impressions_pb2_grpc, ranking_pb2
from ranker.counterfactual.rescoring import score_again
from server.config import ConfigError
from server.config_sections import ImpressionsConfig
from tests import tiny
from tests.conftest import eventually
from tests.server.frontend import EXPLORE


async def test_each_answer_is_logged_once_as_the_caller_got_it(logging):
    _, frontend, rows = await logging()
    answers = [
        await frontend.rank(user_id=i % 4, top_k=7 * (i % 2), surface=("home", "related")[i % 3 == 0])
        for i in range(60)
    ]
    logged = {row["request_id"]: row for row in await rows()}
    assert len(logged) == len(answers) == len({a.request_id for a in answers})
    for i, answer in enumerate(answers):
        row = logged[answer.request_id]
        explained = answer.explanation
        assert row["pin_ids"] == list(answer.pin_ids)
        assert row["utilities"] == list(answer.utilities)
        assert row["probabilities"] == list(explained.head_probabilities)
        np.testing.assert_array_equal(np.float32(row["party_utilities"]), list(explained.party_utilities))
        assert row["party_weights"] == list(explained.party_weights)
        assert (row["heads"], row["parties"]) == (list(explained.heads), list(explained.parties))
        assert (row["user_id"], row["candidates"]) == (i % 4, 20)
        assert row["model"] == "tiny@2"
        assert row["utility_digest"] == answer.versions.utility
        assert row["label"] == "stable"
        assert (row["arm"] or "") == answer.exploration.arm
        assert [list(range(1, 21))[place] for place in row["places"]] == row["pin_ids"]
        assert abs(row["time_ms"] - time.time() * 1e3) < 600_000
    arms = Counter(row["arm"] for row in logged.values())
    assert {"more_creator", "less_creator", "best-5"} <= set(arms)


async def test_a_logged_request_replays_to_the_logged_order_to_the_bit(logging):
    """From the rows that were read: tensors, logits, probabilities, utilities, the arm, and the order."""
    _, frontend, rows = await logging(impressions={"features_share": 1.0}, engine="numpy")
    for i in range(40):
        await frontend.rank(user_id=i % 4, surface=("home", "related")[i % 2])
    manifest = tiny.manifest(2)
    engine = NumpyEngine(tiny.network(seed=2), manifest.specs, 2)
    table = load_utility(tiny.UTILITY.encode(), manifest)
    exploration = load_exploration(EXPLORE, manifest, table)
    arms = set()
    for row in await rows():
        (kept,) = decode_golden(row["features"])
        fetched, surface = kept.fetched, row["surface"]
        probabilities = calibrate(manifest, engine.run(Assembler(manifest).assemble(fetched, surface)))
        np.testing.assert_array_equal(kept.probabilities, probabilities)
        parties = table.party_utilities(surface, probabilities, fetched)
        pins = np.arange(1, 21, dtype=np.uint64)
        utilities = table.combine(surface, parties)
        decision = exploration.surfaces[surface].explore(row["request_id"], pins, parties, utilities)
        arm = getattr(decision, "arm", None) if hasattr(decision, "order") else None
        order = decision.order if arm else np.argsort(-utilities, kind="stable")
        in_force = decision.utilities if arm else utilities
        assert row["arm"] == arm
        assert row["pin_ids"] == pins[order].tolist()
        assert row["utilities"] == in_force[order].tolist()
        np.testing.assert_array_equal(np.reshape(row["party_utilities"], parties.shape), parties[order])
        found = exploration.surfaces[surface].propensities(parties, order)
        assert row["order_propensity"] == found.order
        assert row["propensities"] == found.positions.tolist()
        arms.add(arm)
    assert len(arms) == 4


@pytest.mark.parametrize("engine", ["numpy", "openvino"])
async def test_a_fair_share_of_the_answers_keeps_rows_that_score_to_the_logged_probabilities_to_the_bit(
    logging, store, tmp_path, engine
):
    _, frontend, rows = await logging(impressions={"features_share": 0.5}, engine=engine)
    answers = [await frontend.rank(user_id=i % 4, top_k=9) for i in range(300)]
    explored = {answer.request_id: answer.HasField("exploration") for answer in answers}
    for i in range(30):
        embedding = ranking_pb2.QueryEmbedding(space="tiny@1", values=[1, -1, i / 10, 0.5])
        await frontend.rank(surface="related", query=ranking_pb2.Query(embedding=embedding))
    kept = {row["request_id"]: row["features"] is not None for row in await rows()}
    assert 100 < sum(kept[i] for i in explored) < 200  # of 300, 5.8 standard deviations
    shares = [np.mean([explored[i] for i in explored if kept[i] is keeps]) for keeps in (True, False)]
    assert abs(shares[0] - shares[1]) < 0.3  # 5 standard deviations: who keeps rows does not depend on exploration
    log = f"file://{tmp_path / 'log'}"
    join_log(
        lambda table, needed: read_tables(log, table, wanted=needed), tmp_path / "joined", Wanted(Window(60_000, 0))
    )
    bundle, scored = store.read("tiny", 2), set()
    for slates in read_slates(tmp_path / "joined"):
        used, (again,) = score_again(tmp_path / "joined", slates, bundle.manifest, [bundle], engine_factory(engine))
        scored |= set(used.request_ids.tolist())
        for name in ("probabilities", "attribute_values", "party_utilities"):
            np.testing.assert_array_equal(getattr(again, name), getattr(used, name), name)
    assert scored == {i for i in kept if kept[i]}


async def test_no_request_explores_when_exploration_is_off(logging):
    _, frontend, rows = await logging(explore=False)
    answers = [await frontend.rank(user_id=i) for i in range(20)]
    assert not any(a.HasField("exploration") for a in answers)
    assert {(row["explorer"], row["arm"], row["order_propensity"]) for row in await rows()} == {(None, None, 1.0)}


async def test_actions_are_logged_with_the_answer_that_showed_the_pin(logging):
    _, frontend, rows = await logging()
    answer = await frontend.rank()
    now_ms = int(time.time() * 1000)
    one = {"user_id": 1, "surface": "home", "action": "save", "time_ms": now_ms}
    shown = activity_pb2.Action(event_id=1, pin_id=answer.pin_ids[3], request_id=answer.request_id, position=3, **one)
    elsewhere = activity_pb2.Action(event_id=2, pin_id=5, **one)
    for _ in range(2):  # sent again: logged again, and the join counts it once
        await frontend.activity.Record(activity_pb2.RecordRequest(actions=[shown, elsewhere]))
    logged = await rows("actions")
    assert [row["event_id"] for row in logged] == [1, 2, 1, 2]
    assert (logged[0]["request_id"], logged[0]["position"]) == (answer.request_id, 3)
    assert logged[0]["pin_id"] == answer.pin_ids[3]
    assert (logged[1]["request_id"], logged[1]["position"]) == (None, None)
    assert {row["action"] for row in logged} == {"save"}
    assert all(row["received_ms"] >= now_ms for row in logged)


async def test_a_refused_action_is_not_logged(logging):
    _, frontend, rows = await logging()
    await frontend.rank()
    wrong = activity_pb2.Action(event_id=1, user_id=1, pin_id=1, action="save", surface="nowhere", time_ms=10**12)
    with pytest.raises(grpc.aio.AioRpcError):
        await frontend.activity.Record(activity_pb2.RecordRequest(actions=[wrong]))
    assert await rows("actions") == []


async def test_reports_of_what_was_seen_are_logged(logging):
    _, frontend, rows = await logging(candidates_max=5_000)
    answer = await frontend.rank()
    await frontend.impressions.Seen(impressions_pb2.SeenRequest(request_id=answer.request_id, positions=[0, 1, 4]))
    await frontend.impressions.Seen(impressions_pb2.SeenRequest(request_id=answer.request_id, positions=[4_999]))
    logged = await rows("seen")
    assert [(row["request_id"], row["positions"]) for row in logged] == [
        (answer.request_id, [0, 1, 4]),
        (answer.request_id, [4_999]),  # the last that an answer of this server may have
    ]


async def test_a_report_names_its_user_and_each_position_once(logging):
    _, frontend, rows = await logging()
    answer = await frontend.rank(user_id=0)
    for user in ({}, {"user_id": 0}, {"user_id": 2**64 - 1}):
        report = impressions_pb2.SeenRequest(request_id=answer.request_id, positions=[4, 1, 4, 1, 1], **user)
        await frontend.impressions.Seen(report)
    logged = await rows("seen")
    assert [row["user_id"] for row in logged] == [None, 0, 2**64 - 1]
    assert {tuple(row["positions"]) for row in logged} == {(1, 4)}


async def test_an_answer_has_a_bounded_number_of_reports_and_others_go_on(logging):
    _, frontend, rows = await logging()
    answers = [await frontend.rank() for _ in range(2)]
    reports = [impressions_pb2.SeenRequest(request_id=a.request_id, positions=[0], user_id=1) for a in answers]
    start_s, taken, refused = time.monotonic(), 0, None
    while refused is None:
        try:
            await frontend.impressions.Seen(reports[0])
            taken += 1
        except grpc.aio.AioRpcError as error:
            refused = error
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.details().startswith("more than 100 reports of this answer came in 10 s")
    assert 100 <= taken <= 100 + 10 * (time.monotonic() - start_s + 1)
    await frontend.impressions.Seen(reports[1])
    logged = Counter(row["request_id"] for row in await rows("seen"))
    assert logged == {answers[0].request_id: taken, answers[1].request_id: 1}


async def test_what_one_user_sends_of_another_users_answer_is_not_attributed(logging, tmp_path):
    """A forger who has got another user's request id, through a real server, log and join."""
    _, frontend, rows = await logging()
    answers = {user: await frontend.rank(user_id=user) for user in (1, 2)}
    victims, own = answers[1], answers[2]
    now_ms = int(time.time() * 1e3)

    def save(event_id, user, answer, position):
        return activity_pb2.Action(
            event_id=event_id, user_id=user, pin_id=answer.pin_ids[position], action="save", surface="home",
            time_ms=now_ms, request_id=answer.request_id, position=position,
        )  # fmt: skip

    forged = [save(1, 2, victims, 0), save(2, 2, victims, 3)]
    await frontend.activity.Record(activity_pb2.RecordRequest(actions=[*forged, save(3, 2, own, 1)]))
    for answer, user, positions in ((victims, 2, [0, 1]), (victims, 3, [2]), (own, 2, [5]), (victims, 1, [9])):
        report = impressions_pb2.SeenRequest(request_id=answer.request_id, positions=positions, user_id=user)
        await frontend.impressions.Seen(report)
    await rows()
    log, out = f"file://{tmp_path / 'log'}", tmp_path / "joined"
    joined = join_log(lambda name, needed: read_tables(log, name, wanted=needed), out, Wanted(Window(60_000, 60_000)))
    counts = joined.manifest.counts
    assert (counts.attributed, counts.unattributed, counts.seen_of_other_users) == (1, {"other_user": 2}, 2)
    found = {row["request_id"]: row for part in read_requests(out) for row in part.to_pylist()}
    assert [place for place, was in enumerate(found[victims.request_id]["seen"]) if was] == [9]
    assert [place for place, was in enumerate(found[own.request_id]["seen"]) if was] == [5]
    assert found[victims.request_id]["outcomes"] == []
    assert [outcome["event_id"] for outcome in found[own.request_id]["outcomes"]] == [3]


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"positions": [1]}, "request_id: 0; send the request_id of the answer"),
        ({"request_id": 1}, "positions: 0 positions; send at least one, at most 10,000"),
        (
            {"request_id": 1, "positions": range(10_001)},
            "positions: 10001 positions; send at least one, at most 10,000",
        ),
        (
            {"request_id": 1, "positions": [4_999, 7_000, 5_000, 4_294_967_295]},
            (
                "positions[1]: 7000; answers have at most 5000 pins (candidates_max), and positions count from 0, in "
                "the order of the answer"
            ),
        ),
    ],
)
async def test_a_report_that_says_nothing_or_of_no_answer_is_refused(logging, report, told):
    _, frontend, _ = await logging(candidates_max=5_000)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await frontend.impressions.Seen(impressions_pb2.SeenRequest(**report))
    assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, told)


async def test_a_server_without_a_log_says_so(channel):
    stub = impressions_pb2_grpc.ImpressionServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Seen(impressions_pb2.SeenRequest(request_id=1, positions=[0]))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error.value.details() == "this server keeps no impression log; set impressions.to"


async def report_until_refused(frontend):
    for request_id in itertools.count(1):  # of one answer, the log takes a few
        await frontend.impressions.Seen(
            impressions_pb2.SeenRequest(request_id=request_id, positions=range(5_000), user_id=1)
        )


class StuckDisk:
    """A spool folder whose disk takes no row until it is let go.

    Attributes:
        reached: whether the writer waits for it.
        let_go: set it to let the disk go on.
        ended: for each wait of the writer, whether it ended because of that.
    """

    def __init__(self, monkeypatch):
        self.reached, self.let_go, self.ended = threading.Event(), threading.Event(), []
        append = Segment.append

        def stuck(segment, batch):
            if not self.let_go.is_set():
                self.reached.set()
                self.ended.append(self.let_go.wait(timeout=60))
            append(segment, batch)

        monkeypatch.setattr(Segment, "append", stuck)


async def test_a_full_queue_drops_rows_counts_them_and_delays_no_answer(logging, monkeypatch):
    """The writer stands still from the first row until the last answer: what waited for it would wait for ever."""
    disk = StuckDisk(monkeypatch)
    server, frontend, rows = await logging(
        impressions={"queue_bytes_max": 1 << 20, "flush_s": 0.01}, candidates_max=5_000
    )
    pins = range(1, 2_001)
    answers = [await frontend.rank()]
    await eventually(disk.reached.is_set)
    answers += [await frontend.rank(pins=pins) for _ in range(30)]
    dropped = server.metrics.value("pinrank_impression_log_rows_total", table="impressions", outcome="dropped")
    assert 0 < dropped < 30
    answers.append(await frontend.rank(pins=pins))
    full = server.metrics.value("pinrank_impression_log_rows_total", table="impressions", outcome="dropped")
    assert full == dropped + 1
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await report_until_refused(frontend)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert disk.ended == []
    disk.let_go.set()
    logged = await rows()
    assert disk.ended == [True]
    assert len(logged) == len(answers) - full
    assert {row["request_id"] for row in logged} < {a.request_id for a in answers}


async def test_a_share_of_the_answers_is_logged(logging):
    _, frontend, rows = await logging(impressions={"share": 0.5})
    answers = {(await frontend.rank(pins=[1, 2])).request_id for _ in range(200)}
    logged = {row["request_id"] for row in await rows()}
    assert logged < answers
    assert 60 < len(logged) < 140  # of 200, at least 5.6 standard deviations away


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("ftp://here", "'ftp://here': use file:///folder, or s3://bucket/prefix"),
        ("file://here", "file://here: write the whole path of the folder: file:///var/log/pinrank"),
        ("s3://key:secret@bucket/log", "s3://...: remove the keys from the URL and set them in AWS_* variables"),
        (
            "s3://bucket/log",
            (
                "s3://bucket/log: a log in a bucket needs a local folder for rows on their way; "
                "set impressions.spool_folder"
            ),
        ),
    ],
)
async def test_a_place_that_cannot_be_used_ends_the_start_and_is_named(start_server, to, told):
    with pytest.raises(ConfigError) as error:
        await start_server(impressions=ImpressionsConfig(to=to))
    assert str(error.value) == f"impressions.to: {told}"


async def test_no_request_explores_while_the_server_is_overloaded(logging, monkeypatch):
    monkeypatch.setattr("server.request.pipeline._CALM_S", 3_600)
    _, frontend, rows = await logging(requests_in_flight_max=1)
    calm = [await frontend.rank(user_id=i) for i in range(20)]
    outcomes = await asyncio.gather(*(frontend.rank(user_id=i) for i in range(20)), return_exceptions=True)
    refused = [error for error in outcomes if isinstance(error, grpc.aio.AioRpcError)]
    assert refused
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    strained = [await frontend.rank(user_id=i) for i in range(20)]
    assert any(answer.HasField("exploration") for answer in calm)
    assert not any(answer.HasField("exploration") for answer in strained)
    logged = {row["request_id"]: row for row in await rows()}
    assert {logged[answer.request_id]["explorer"] for answer in strained} == {None}
    assert None not in {logged[answer.request_id]["explorer"] for answer in calm}
