from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from model_store.bundle.manifest import FileEntry, Manifest, Surface
from model_store.exploration.explorer import Explored
from model_store.model.products import Products
from model_store.model.utility import load_utility
from pinrank.v1 import ranking_pb2
from server.api.wire import parse_request, to_query, to_response
from server.config import ServerConfig
from server.errors import InvalidRequestError
from server.request.pipeline import Ranking, RankQuery
from server.request.routing import ServedModel, ServedModels
from server.request.scoring import Scores
from tests import tiny

Query, Embedding = ranking_pb2.Query, ranking_pb2.QueryEmbedding
NOW_S = 100.0


def served(version):
    manifest = tiny.manifest(version)
    model = SimpleNamespace(
        manifest=manifest, digest=f"{version:064}", products=Products("float32", "float32"), query_norm_max=300.0
    )
    return ServedModel(model, load_utility(tiny.UTILITY.encode(), manifest))


def models(**labels):
    found = ServedModels("stable")
    found.by_version = {version: served(version) for version in {1, *labels.values()}}
    found.by_label = {label: found.by_version[version] for label, version in {"stable": 1, **labels}.items()}
    return found


def config(**surfaces):
    return ServerConfig(
        model_store="m", model="tiny", feature_store="memory://", labels=("stable", "canary", "beta"), candidates_max=5,
        surfaces=surfaces,
    )  # fmt: skip


def request(**fields):
    return ranking_pb2.RankRequest(**{"user_id": 7, "pin_ids": [3, 1, 2], "surface": "home"} | fields)


def query(one, known=None, settings=None, remaining_s=None):
    parsed = parse_request(one.SerializeToString())
    return to_query(parsed, known or models(), settings or config(), NOW_S, remaining_s)


def problems(one, known=None):
    with pytest.raises(InvalidRequestError) as raised:
        query(one, known)
    return {violation.field: violation.description for violation in raised.value.violations}


def test_a_request_becomes_a_query():
    known = models()
    found = query(request(top_k=2, explain=True), known)
    assert (found.user_id, found.surface, found.lane, found.label) == (7, "home", "home", "stable")
    assert found.pin_ids.tolist() == [3, 1, 2]
    assert found.pin_ids.dtype == np.uint64
    assert found.served is known.default
    assert found.cheaper is found.query_pin_id is found.query_vector is None
    assert (found.top_k, found.explain) == (2, True)


@pytest.mark.parametrize(
    ("remaining_s", "deadline_s"),
    [
        pytest.param(None, NOW_S + 0.25, id="its surface's budget"),
        pytest.param(0.5, NOW_S + 0.5, id="its call's budget"),
        pytest.param(0.0, NOW_S, id="a call without time left"),
    ],
)
def test_a_deadline_is_the_calls_or_the_surfaces(remaining_s, deadline_s):
    assert (
        query(request(), settings=config(home={"deadline_ms": 250}), remaining_s=remaining_s).deadline_s == deadline_s
    )


def test_a_request_takes_the_model_that_it_names():
    known = models(canary=2)
    assert query(request(), known).served is known.by_version[1]
    labelled = query(request(label="canary"), known)
    assert (labelled.served, labelled.label) == (known.by_version[2], "canary")
    versioned = query(request(version=2), known)
    assert (versioned.served, versioned.label) == (known.by_version[2], "")


def test_a_request_without_a_label_gets_the_one_that_its_user_is_given():
    known = models(canary=2)
    known.share_traffic({"home": {"canary": 1.0}})
    assert query(request(), known).label == "canary"
    assert query(request(surface="related", query=Query(pin_id=1)), known).label == "stable"


@pytest.mark.parametrize(
    ("fields", "cheaper_label", "cheaper"),
    [
        pytest.param({}, "canary", 2, id="the surface's cheaper label"),
        pytest.param({}, None, None, id="a surface without one"),
        pytest.param({"label": "stable"}, "canary", 2, id="who asks for a label"),
        pytest.param({"version": 1}, "canary", None, id="who asks for a version gets that version"),
        pytest.param({"label": "canary"}, "canary", None, id="the cheaper one was asked for"),
        pytest.param({}, "beta", None, id="a label that nothing is served for"),
    ],
)
def test_what_may_answer_instead_under_overload(fields, cheaper_label, cheaper):
    known = models(canary=2)
    known.by_label[""] = known.by_version[2]  # no label's name; nobody means it
    settings = config(home={"cheaper_label": cheaper_label})
    found = query(request(**fields), known, settings).cheaper
    assert (found and found.version) == cheaper


@pytest.mark.parametrize(
    ("fields", "field", "description"),
    [
        pytest.param({"surface": "shop"}, "surface", "unknown surface 'shop'; tiny@1 ranks home, related", id="shop"),
        pytest.param({"label": "beta"}, "label", "unknown label 'beta'; this server serves stable, canary", id="label"),
        pytest.param({"label": ""}, "label", "unknown label ''; this server serves stable, canary", id="empty label"),
        pytest.param({"version": 9}, "version", "version 9 is not served; this server serves 1, 2", id="version"),
        pytest.param({"version": 0}, "version", "version 0 is not served; this server serves 1, 2", id="version 0"),
        pytest.param({"pin_ids": []}, "pin_ids", "no candidates; send at least one pin id", id="no candidates"),
        pytest.param(
            {"pin_ids": range(6)}, "pin_ids", "6 candidates; this server accepts at most 5 (candidates_max)", id="many"
        ),
        pytest.param(
            {"pin_ids": [4, 4, 4, 9, 9]}, "pin_ids", "3 duplicate ids, for example [4, 9]; send each pin once",
            id="duplicates",
        ),
        pytest.param(
            {"pin_ids": [4, 4, 7, 9, 9]}, "pin_ids", "2 duplicate ids, for example [4, 9]; send each pin once",
            id="duplicates beside an id that is sent once",
        ),
        pytest.param(
            {"label": "beta", "query": Query(pin_id=5)}, "label",
            "unknown label 'beta'; this server serves stable, canary", id="label of a request with a query",
        ),
        pytest.param(
            {"surface": "related"}, "query", "surface 'related' ranks against a query; set pin_id or embedding",
            id="no query",
        ),
        pytest.param(
            {"query": Query()}, "query", "the query is empty; set pin_id or embedding, or omit the query", id="empty"
        ),
        pytest.param(
            {"query": Query(embedding=Embedding(space="other@1", values=[0] * 4))}, "query.embedding.space",
            "space 'other@1'; tiny@1 reads 'tiny@1'", id="space",
        ),
        pytest.param(
            {"query": Query(embedding=Embedding(space="tiny@1", values=[0] * 5))}, "query.embedding.values",
            "5 values; tiny@1 has 4 dimensions", id="dimensions",
        ),
        pytest.param(
            {"query": Query(embedding=Embedding(space="tiny@1", values=[0, 1, np.inf, np.nan]))},
            "query.embedding.values[2]", "inf is not finite", id="not finite",
        ),
        pytest.param(
            {"query": Query(embedding=Embedding(space="tiny@1", values=[0, 300, 400, 0]))}, "query.embedding.values",
            "the vector's Euclidean norm is 500; tiny@1 takes at most 300, 100 times the longest vector of tiny@1 that "
            "it knows; send a vector of that space, in its units",
            id="too long",
        ),
        pytest.param(
            {"query": Query(embedding=Embedding(space="tiny@1", values=[3e38] * 4))}, "query.embedding.values",
            "the vector's Euclidean norm is 6e+38; tiny@1 takes at most 300, 100 times the longest vector of tiny@1 "
            "that it knows; send a vector of that space, in its units",
            id="far too long",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_field(fields, field, description):
    assert problems(request(**fields), models(canary=2)) == {field: description}


def test_as_many_candidates_as_the_limit_are_taken():
    assert len(query(request(pin_ids=range(5))).pin_ids) == 5


def test_at_most_three_duplicates_are_shown():
    settings = config().model_copy(update={"candidates_max": 100})
    with pytest.raises(InvalidRequestError, match=r"4 duplicate ids, for example \[1, 2, 3\]; send"):
        query(request(pin_ids=[1, 2, 3, 4] * 2), settings=settings)


def test_a_candidate_list_is_not_mistaken_for_duplicates_when_too_long():
    assert problems(request(pin_ids=[1] * 6)) == {
        "pin_ids": "6 candidates; this server accepts at most 5 (candidates_max)"
    }


@pytest.mark.parametrize(
    ("length", "shown"),
    [
        pytest.param(60, repr("x" * 60), id="whole"),
        pytest.param(61, f"{'x' * 60!r}... (61 characters)", id="cut"),
    ],
)
def test_what_a_caller_sent_is_quoted_up_to_sixty_characters(length, shown):
    assert problems(request(surface="x" * length))["surface"] == f"unknown surface {shown}; tiny@1 ranks home, related"


def test_a_query_is_a_pin_or_a_vector_in_the_models_space():
    assert query(request(query=Query(pin_id=5))).query_pin_id == 5
    found = query(request(query=Query(embedding=Embedding(space="tiny@1", values=[0, 1, 2, 3.5]))))
    assert found.query_pin_id is None
    assert found.query_vector.tolist() == [0, 1, 2, 3.5]


def test_a_query_vector_of_the_largest_norm_is_taken():
    found = query(request(query=Query(embedding=Embedding(space="tiny@1", values=[0, 180, 240, 0]))))
    assert found.query_vector.tolist() == [0, 180, 240, 0]
    assert found.query_vector.dtype == np.float32


def test_a_query_is_checked_against_the_model_that_the_request_names():
    known = models(canary=2)
    fields = tiny.manifest_fields(2) | {
        "inputs": tiny.INPUTS[:-1],
        "surfaces": (Surface(name="home"), Surface(name="related")),
    }
    without_query = Manifest(**fields, files={"network.onnx": FileEntry(sha256="0" * 64, size_bytes=0)})
    known.by_label["canary"].model.manifest = without_query
    assert query(request(query=Query(pin_id=5)), known).query_pin_id == 5
    assert problems(request(label="canary", query=Query(pin_id=5)), known) == {
        "query": "model tiny@2 does not read a query; omit it"
    }


def test_bytes_that_are_no_request_are_refused():
    assert parse_request(request(pin_ids=[]).SerializeToString()).message == request(pin_ids=[])
    with pytest.raises(InvalidRequestError, match=r"cannot parse the request as pinrank\.v1\.RankRequest"):
        parse_request(b"\xff")


def ranking(known, pin_ids=(3, 1, 2), **changes):
    """Return an answer that turns the request's order round."""
    rows = len(pin_ids)
    scores = Scores(rows, rows, 0, heads=2, parties=2)
    scores.utilities[:] = np.arange(rows) / 4
    scores.probabilities[:] = np.arange(2 * rows).reshape(rows, 2) / 64
    scores.party_utilities[:] = np.arange(2 * rows).reshape(rows, 2)
    scores.arrange(np.array(pin_ids, np.uint64))
    fields = {"served": known.default, "scores": scores, "stage_s": {"fetch": 0.0015, "score": 2.4e-6}}
    fields |= {"degradation": {}, "fetched": None}
    return Ranking(**fields | changes)


def answer_bytes(one, known, found, request_id=0):
    asked = query(one, known, config().model_copy(update={"candidates_max": 10_000}))
    asked.request_id = request_id
    return to_response(asked, found, 11, 22)


def answer(one, known, found):
    return ranking_pb2.RankResponse.FromString(answer_bytes(one, known, found))


def test_an_answer_has_the_candidates_in_order_with_their_utilities_versions_and_timings():
    known = models()
    found = answer(request(), known, ranking(known))
    assert list(found.pin_ids) == [2, 1, 3]
    assert list(found.utilities) == [0.5, 0.25, 0.0]
    assert (found.versions.model, found.versions.model_version) == ("tiny", 1)
    timings = found.timings
    assert (timings.wire_us, timings.total_us, timings.fetch_us, timings.score_us) == (11, 22, 1500, 2)
    assert not found.HasField("degradation")
    assert not found.HasField("explanation")


def test_a_stage_of_seconds_is_told_to_the_microsecond():
    known = models()
    timings = answer(request(), known, ranking(known, stage_s={"fetch": 2.0, "score": 1.000001})).timings
    assert (timings.fetch_us, timings.score_us) == (2_000_000, 1_000_001)


def test_an_answer_says_how_it_is_degraded():
    known = models()
    found = answer(request(), known, ranking(known, degradation={"pins_missing": 1}))
    assert found.degradation == ranking_pb2.Degradation(pins_missing=1)


@pytest.mark.parametrize("request_id", [1, 255, 1 << 63, (1 << 64) - 1])
def test_an_answer_has_its_id(request_id):
    known = models()
    found = ranking_pb2.RankResponse.FromString(answer_bytes(request(), known, ranking(known), request_id))
    assert found.request_id == request_id
    assert list(found.pin_ids) == [2, 1, 3]


def test_an_explored_answer_names_its_arm_and_explains_by_its_weights():
    known = models()
    order = np.array([2, 0, 1])
    found = ranking(known, explored=Explored("more", order, np.zeros(3, np.float32), np.array([1.0, 2.0]), 0.1, 1.0))
    explored = answer(request(explain=True), known, found)
    assert explored.exploration.arm == "more"
    assert list(explored.explanation.party_weights) == [1.0, 2.0]
    assert not answer(request(), known, ranking(known)).HasField("exploration")


def test_an_answer_explains_when_it_is_asked_to():
    known = models()
    found = answer(request(explain=True), known, ranking(known)).explanation
    assert (list(found.heads), list(found.parties)) == (["save", "hide"], ["pinner", "creator"])
    assert list(found.party_weights) == [1.0, 0.5]
    assert list(found.head_probabilities) == [4 / 64, 5 / 64, 2 / 64, 3 / 64, 0, 1 / 64]
    assert list(found.party_utilities) == [4, 5, 2, 3, 0, 1]


@pytest.mark.parametrize("rows", [1, 15, 16, 31, 32, 127, 128, 129, 2032, 2047, 2048, 2064])
def test_an_answer_of_any_length_is_one_that_protobuf_reads_and_would_not_write_shorter(rows):
    # A length takes a second byte from 128 bytes on: 16 ids, 32 utilities; a third from 16,384 bytes on: 2,048 ids.
    known = models()
    content = answer_bytes(request(pin_ids=range(rows)), known, ranking(known, range(rows)))
    found = ranking_pb2.RankResponse.FromString(content)
    assert len(content) == found.ByteSize()
    assert list(found.pin_ids) == list(range(rows))[::-1]
    assert len(found.utilities) == rows


def test_a_query_keeps_its_model():
    known = models(canary=2)
    found = query(request(), known)
    known.by_label["stable"] = known.by_version[2]
    assert isinstance(found, RankQuery)
    assert found.served is known.by_version[1]
