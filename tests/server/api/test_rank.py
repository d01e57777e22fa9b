from __future__ import annotations

import math

import grpc
import numpy as np
import pytest
from rich.console import Console

from feature_client.stores.open_store import open_store
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.model.assembly import Assembler
from model_store.model.loaded import calibrate
from model_store.model.utility import load_utility
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from server.cli.rank_call import show
from tests import tiny


@pytest.fixture
def stub(channel):
    return ranking_pb2_grpc.RankingServiceStub(channel)


def request(pins, surface="home", **fields):
    return ranking_pb2.RankRequest(user_id=fields.pop("user_id", 1), pin_ids=pins, surface=surface, **fields)


async def test_answer_is_the_candidates_ordered_by_utility(stub):
    pins = list(range(1, 31))
    answer = await stub.Rank(request(pins))
    assert sorted(answer.pin_ids) == pins
    assert list(answer.utilities) == sorted(answer.utilities, reverse=True)
    assert not answer.HasField("explanation")
    assert answer.degradation == ranking_pb2.Degradation()


async def test_explained_answer_equals_the_reference_computed_by_hand(stub):
    pins = list(range(1, 31))
    answer = await stub.Rank(request(pins, user_id=2, explain=True))
    manifest = tiny.manifest()
    # The store keeps sequences oldest first, the model reads them newest first: [3, 2] with actions [hide, save].
    fetched = tiny.fetched(pins, [3, 2], user=2)
    fetched.events["action"] = [1, 0]
    engine = NumpyEngine(tiny.network(seed=1), manifest.specs, 2)
    probabilities = calibrate(manifest, engine.run(Assembler(manifest).assemble(fetched, "home")))
    table = load_utility(tiny.UTILITY.encode(), manifest)
    parties = table.party_utilities("home", probabilities, fetched)
    order = np.argsort(-(parties @ [1.0, 0.5]), kind="stable")
    assert list(answer.pin_ids) == [pins[i] for i in order]
    explanation = answer.explanation
    assert list(explanation.heads) == ["save", "hide"]
    assert list(explanation.parties) == ["pinner", "creator"]
    assert list(explanation.party_weights) == [1.0, 0.5]
    np.testing.assert_allclose(explanation.head_probabilities, probabilities[order].ravel(), atol=1e-5)
    np.testing.assert_allclose(explanation.party_utilities, parties[order].ravel(), atol=1e-5)


async def test_top_k_returns_the_head_of_the_full_ranking(stub):
    whole = await stub.Rank(request(list(range(1, 31))))
    best = await stub.Rank(request(list(range(1, 31)), top_k=7, explain=True))
    assert list(best.pin_ids) == list(whole.pin_ids)[:7]
    assert len(best.explanation.head_probabilities) == 7 * 2


async def test_versions_and_timings_come_with_every_answer(stub, server):
    answer = await stub.Rank(request([1, 2, 3]))
    model = server.status.default.model
    assert (answer.versions.model, answer.versions.model_version) == ("tiny", 1)
    assert answer.versions.model_digest == model.digest
    assert answer.versions.utility == server.status.default.utility.digest
    assert list(answer.versions.feature_groups) == ["pin_core@1", "user_core@1", "actions@1"]
    assert answer.versions.products == "float32"
    timings = answer.timings
    stages = [timings.wire_us, timings.fetch_us, timings.assemble_us, timings.score_us, timings.utility_us]
    assert all(stage > 0 for stage in stages)
    assert sum(stages) <= timings.total_us


async def test_label_and_version_choose_the_model(stub):
    pins = list(range(1, 31))
    stable, canary, exact = [
        await stub.Rank(request(pins, **choice)) for choice in ({}, {"label": "canary"}, {"version": 2})
    ]
    assert (stable.versions.model_version, canary.versions.model_version, exact.versions.model_version) == (1, 2, 2)
    assert list(canary.pin_ids) == list(exact.pin_ids) != list(stable.pin_ids)


async def test_query_pin_and_its_embedding_rank_alike(stub):
    pins = list(range(1, 31))
    vector = tiny.pin_rows(np.array([9]))["embedding"][0].astype(np.float32)
    by_pin = await stub.Rank(request(pins, "related", query=ranking_pb2.Query(pin_id=9)))
    embedding = ranking_pb2.QueryEmbedding(space="tiny@1", values=vector.tolist())
    by_vector = await stub.Rank(request(pins, "related", query=ranking_pb2.Query(embedding=embedding)))
    assert list(by_pin.pin_ids) == list(by_vector.pin_ids)
    assert by_pin.utilities == by_vector.utilities


async def test_unknown_user_is_ranked_by_defaults_and_flagged(stub):
    answer = await stub.Rank(request([1, 2, 3], user_id=999))
    assert len(answer.pin_ids) == 3
    assert answer.degradation == ranking_pb2.Degradation(user_missing=True, sequence_missing=True)


async def test_missing_pins_are_ranked_counted_and_never_dropped(stub):
    answer = await stub.Rank(request([1, 2, 3, 900, 901]))
    assert sorted(answer.pin_ids) == [1, 2, 3, 900, 901]
    assert answer.degradation == ranking_pb2.Degradation(pins_missing=2)


async def test_missing_query_pin_is_flagged(stub):
    answer = await stub.Rank(request([1, 2], "related", query=ranking_pb2.Query(pin_id=900)))
    assert answer.degradation == ranking_pb2.Degradation(query_missing=True)


async def test_values_of_another_embedding_space_are_counted_and_not_read(start_server, config):
    store = open_store(config.feature_store.get_secret_value())
    await store.start()
    keys = tiny.PINS.keys(np.array([1, 2], np.uint64))
    size = tiny.PINS.dtype.itemsize
    await store.multi_put([(keys[0], b"\xff" * (8 + size)), (keys[1], b"short")])
    await store.close()
    server = await start_server()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request([1, 2, 3, 900], user_id=4))
    assert answer.degradation == ranking_pb2.Degradation(pins_missing=3, foreign_values=2)
    utilities = dict(zip(answer.pin_ids, answer.utilities, strict=True))
    # All three have nothing but the default row, so they are worth the same.
    assert utilities[1] == utilities[2] == utilities[900]


async def test_lost_store_degrades_every_answer_and_fails_none(start_server):
    server = await start_server(feature_store="memory://")
    server.store.failing = True
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request([3, 1, 2]))
    assert answer.degradation == ranking_pb2.Degradation(
        user_missing=True, sequence_missing=True, pins_missing=3, store_unavailable=True
    )
    assert list(answer.pin_ids) == [3, 1, 2]  # all alike, so the caller's order stays


async def test_non_finite_scores_keep_the_callers_order_and_say_so(gated):
    server, engine = gated
    engine.spoiled = True
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        answer = await ranking_pb2_grpc.RankingServiceStub(channel).Rank(request([3, 1, 2]))
    assert list(answer.pin_ids) == [3, 1, 2]
    assert all(math.isnan(utility) for utility in answer.utilities)
    assert answer.degradation == ranking_pb2.Degradation(non_finite_scores=3, fallback_order=True)


def test_titles_are_shown_with_their_brackets(capsys):
    answer = ranking_pb2.RankResponse(pin_ids=[1, 2], utilities=[0.5, 0.25])
    show(answer, Console(markup=False, emoji=False), {1: "[live] :fire: [bold]loud[/]", 2: "[/] no tag"})
    shown = capsys.readouterr().out
    assert "[live] :fire: [bold]loud[/]" in shown
    assert "[/] no tag" in shown
