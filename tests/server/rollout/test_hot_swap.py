"""Versions that come and go while requests are answered, on real stores, engines and channels."""

from __future__ import annotations

import asyncio
import collections

import grpc
import numpy as np
import onnx
import pytest

from feature_client.codec import encode_rows
from feature_client.stores.open_store import open_store
from model_store.bundle.manifest import Head, Surface
from pinrank.v1 import ranking_pb2
from tests import tiny
from tests.conftest import eventually
from tests.server.gated import GatedEngine
from tests.server.swapping import ALIKE, held, own_golden, publish, sample


async def test_a_moved_label_is_followed_without_a_failed_or_degraded_request(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    for version in (2, 3):
        publish(store, tmp_path, version)
    seen, stop = collections.Counter(), asyncio.Event()

    async def ask(user):
        while not stop.is_set():
            answer = await call.rank(user=user)
            assert answer.degradation == ranking_pb2.Degradation()
            assert answer.versions.model_digest == store.release("tiny", answer.versions.model_version).digest
            seen[answer.versions.model_version] += 1

    asking = [asyncio.ensure_future(ask(user)) for user in (1, 2, 3)]
    for version in (2, 3, 2, 1):
        before = seen[version]
        store.set_label("tiny", "stable", version)
        await eventually(lambda v=version, b=before: seen[v] > b + 3, 30)
        await eventually(lambda v=version: list(server.status.versions) == [v], 30)
    stop.set()
    await asyncio.gather(*asking)
    assert set(seen) == {1, 2, 3}
    assert sample(server, "pinrank_model_swaps_total", outcome="done") == 5
    assert server.status.installed == len(server.status.costs) == 1


async def test_a_version_that_waits_for_its_last_request_is_kept_until_then(serve, store, tmp_path, monkeypatch, calls):
    monkeypatch.setattr("server.app.engine_factory", lambda *_: GatedEngine)
    server = await serve(labels=("stable",), engine_streams=1)
    call = calls(server)
    engine = server.status.default.model.engine
    engine.runs.clear()
    engine.gate.clear()
    running = asyncio.ensure_future(call.rank())
    await eventually(lambda: len(engine.runs) == 1)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 1) == "draining", 20)
    assert server.status.default.version == 2
    engine.gate.set()
    assert (await running).versions.model_version == 1
    await eventually(lambda: held(server, 1) == "gone", 20)
    assert await call.version() == 2


async def test_a_run_whose_caller_hung_up_holds_its_version_too(serve, store, tmp_path, monkeypatch, calls):
    monkeypatch.setattr("server.app.engine_factory", lambda *_: GatedEngine)
    server = await serve(labels=("stable",), engine_streams=2)
    call = calls(server)
    engine = server.status.default.model.engine
    engine.runs.clear()
    engine.gate.clear()
    running = asyncio.ensure_future(call.rank())
    await eventually(lambda: len(engine.runs) >= 1)
    running.cancel()
    await eventually(lambda: sample(server, "pinrank_requests_in_flight") == 0)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 1) == "draining", 20)
    for _ in range(50):
        server.swap.step()
    assert held(server, 1) == "draining"
    engine.gate.set()
    await eventually(lambda: held(server, 1) == "gone", 20)


def nan_network():
    """Good on the golden requests' pins, no number beyond: log(9.5 - topic...) of pins that golden requests lack."""
    model = onnx.load_model_from_string(ALIKE)
    model.graph.node.pop()
    helper = onnx.helper
    # sqrt of what is negative for a popularity above 0.9: no golden pin is as popular.
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([[0.95]], np.float32), "most"))
    model.graph.node.extend(
        [
            helper.make_node("Sub", ["most", "pin_scalars"], ["left"]),
            helper.make_node("Sqrt", ["left"], ["root"]),
            helper.make_node("Sub", ["root", "root"], ["nothing"]),
            helper.make_node("Sum", ["candidate_side", "gathered", "interest_logits", "nothing"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def flat_network():
    """The same score for every candidate of a request."""
    model = onnx.load_model_from_string(ALIKE)
    model.graph.node.pop()
    zero = onnx.numpy_helper.from_array(np.zeros((1, 2), np.float32), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.extend(
        [
            onnx.helper.make_node("Mul", ["candidate_side", "zero"], ["none"]),
            onnx.helper.make_node("Mul", ["interest_logits", "zero"], ["none2"]),
            onnx.helper.make_node("Sum", ["none", "gathered", "none2"], ["logits"]),
        ]
    )
    return model.SerializeToString()


def loop_network():
    model = onnx.load_model_from_string(ALIKE)
    model.graph.node.append(onnx.helper.make_node("Loop", ["query"], ["unused"]))
    return model.SerializeToString()


NO_ATTRIBUTES = tiny.UTILITY.replace(" * sqrt(pin.popularity)", "").encode()
BROKEN = {
    "golden scores": ({"network.onnx": tiny.network(seed=99)}, {}, "golden row"),
    "no network": ({"network.onnx": b"nothing"}, {}, "not an ONNX network"),
    "hostile network": ({"network.onnx": loop_network()}, {}, "operator Loop is not allowed"),
    "golden archive": ({"golden.npz": b"PK"}, {}, "not an archive of arrays"),
    "utility": ({"utility.toml": b"broken"}, {}, "the utility table is not TOML"),
    "exploration": (
        {"explore.toml": b"seed = 1\n[surfaces.shop]\nkind = 'order'\nshare = 0.1\nregret_max = 0.1\n"
         b"best = 2\ntemperature = 1.0\nfloor = 0.0"}, {},
        "explore.toml: surfaces.shop: model tiny@2 ranks home, related",
    ),
    "statistics": ({"statistics.json": b"{}"}, {}, "statistics.json: Field required"),
    "surface gone": (
        {"surfaces": (Surface(name="related", query=True),)}, {},
        "breaks callers of stable (tiny@1): surfaces.home: expected ranked, found gone",
    ),
    "head gone": (
        {"heads": (Head(name="save", meaning="other"), Head(name="hide", meaning="hid"))}, {},
        "heads.save.meaning: expected 'saved', found 'other'",
    ),
    "scores not finite": (own_golden(nan_network()), {}, "candidates of recent requests are not finite"),
    "scores say nothing": (
        own_golden(flat_network()) | {"utility.toml": NO_ATTRIBUTES}, {},
        "gives every candidate of a recent request the same utility",
    ),
    "another order": (
        own_golden(tiny.network(seed=5)), {"swap": {"rank_correlation_min": 0.95}},
        "ranks recent requests too differently from the answers that they got: the rank correlation",
    ),
    "too large": (
        {"embeddings.npz": bytes(2_000_000)}, {"swap": {"bundle_bytes_max": 1_000_000}},
        "bytes, the limit is 1,000,000 (bundle_bytes_max)",
    ),
    "a request too large": (
        {"sequence_length": 100_000_000}, {}, "a request of 100 candidates takes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
async def test_a_broken_version_fails_by_name_and_disturbs_nothing(fault, serve, calls, store, tmp_path, monkeypatch):
    changes, settings, reason = BROKEN[fault]
    given_back = []
    monkeypatch.setattr("server.proving.recent_requests._EVERY_S", 0.0)  # keep every request
    monkeypatch.setattr(
        "server.proving.admit_version.give_back_freed", lambda: given_back.append(len(server.status.near_caches))
    )
    server = await serve(**settings)
    call = calls(server)
    for user in (1, 2, 3):
        await call.rank(user=user, pins=range(1, 51))
    folder = tmp_path / "bundles" / "2"
    with pytest.MonkeyPatch.context() as patch:
        if not changes.keys().isdisjoint({"heads", "surfaces", "sequence_length"}):
            patch.setattr(tiny, "golden", lambda *_: [])
        tiny.write_tiny_bundle(folder, 2, **changes)
    store.publish(folder)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 2) == "failed", 30)
    assert reason in await call.reason(2)
    assert await call.version() == 1
    assert sample(server, "pinrank_model_swaps_total", outcome="failed_bundle") == 1
    assert any(reason in event.text for event in (await call.status()).events)
    assert server.status.installed == len(server.status.costs) == 1
    assert {cache.group.ref for cache in server.status.near_caches} == {"pin_core@1"}
    await eventually(lambda: given_back == [1])  # when the near caches it would have read were dropped
    # The next good one is taken in, and the broken one forgotten.
    publish(store, tmp_path, 3, **{"network.onnx": ALIKE, **own_golden(ALIKE)})
    store.set_label("tiny", "stable", 3)
    await eventually(lambda: server.status.default.version == 3, 30)
    assert held(server, 2) == "gone"


async def test_features_that_are_not_there_yet_delay_a_roll_over_and_no_request_mixes_spaces(
    serve, calls, store, tmp_path, redis_url, monkeypatch
):
    """The label moves before the features are loaded: the version waits for them, and takes over once they are."""
    space = tiny.changed(tiny.SPACE, version=2)
    pins = tiny.changed(
        tiny.PINS, version=2, fields=(tiny.changed(tiny.PINS.fields[0], space=space), *tiny.PINS.fields[1:])
    )
    fields = {"groups": (pins, tiny.USERS)}
    monkeypatch.setattr("server.proving.recent_requests._EVERY_S", 0.0)  # keep every request
    url = redis_url.rsplit("/", 1)[0] + "/9"
    features = open_store(url)
    await features.start()
    await features.multi_put(tiny.features().items())
    server = await serve(swap={"accept_changes": ("inputs.query.space",)}, feature_store=url)
    call = calls(server)
    for user in (1, 2, 3):
        await call.rank(user=user)
    golden = [
        tiny.GoldenRequest(g.fetched, g.surface, g.probabilities) for g in tiny.golden(ALIKE, tiny.manifest_fields())
    ]
    publish(store, tmp_path, 2, **fields, **{"network.onnx": ALIKE, "golden.npz": tiny.encode_golden(golden)})
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 2) == "failed", 30)
    reason = await call.reason(2)
    assert "100.0% of" in reason
    assert "load pin_core@2 (pinrank features load)" in reason
    assert await call.version() == 1
    answers, stop = [], asyncio.Event()

    async def ask():
        while not stop.is_set():
            answers.append(await call.rank())

    asking = asyncio.ensure_future(ask())
    ids = np.arange(1, 51, dtype=np.uint64)
    await features.multi_put(zip(pins.keys(ids), encode_rows(pins, tiny.pin_rows(ids)), strict=True))
    await features.close()
    await eventually(lambda: server.status.default.version == 2, 30)
    await eventually(lambda: any(a.versions.model_version == 2 for a in answers), 30)
    stop.set()
    await asking
    for answer in answers:
        group = {1: "pin_core@1", 2: "pin_core@2"}[answer.versions.model_version]
        assert group in answer.versions.feature_groups
        assert answer.degradation == ranking_pb2.Degradation()
    await eventually(lambda: held(server, 1) == "gone", 30)
    assert {cache.group.ref for cache in server.status.near_caches} == {"pin_core@2"}
    # Back again, while both are in the feature store: at once.
    store.rollback("tiny", "stable")
    await eventually(lambda: server.status.default.version == 1, 30)
    assert (await call.rank()).degradation == ranking_pb2.Degradation()


async def test_a_removed_label_is_unknown_and_a_removed_default_goes_on(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server.status.by_label, 30)
    store.set_label("tiny", "canary", None)
    await eventually(lambda: held(server, 2) == "gone", 30)
    with pytest.raises(grpc.aio.AioRpcError, match="unknown label 'canary'; this server serves stable"):
        await call.rank(label="canary")
    store.set_label("tiny", "stable", None)
    number = store.head("tiny").number
    await eventually(lambda: server.status.entry.number == number, 30)
    assert await call.version() == 1


async def test_a_broken_canary_does_not_keep_a_server_from_starting(serve, calls, store, tmp_path):
    publish(store, tmp_path, 2, **{"network.onnx": b"nothing"})
    store.set_label("tiny", "canary", 2)
    server = await serve()
    assert (await calls(server).phases()) == {1: "serving", 2: "failed"}


async def test_only_signed_bundles_are_served_where_keys_are_trusted(serve, calls, store, tmp_path):
    from model_store.registry.signing import Signer
    from tests.model_store.registry.test_store import signing_key

    private, public = signing_key(tmp_path, "anna")
    tiny.write_tiny_bundle(tmp_path / "signed", 2)
    tiny.write_tiny_bundle(tmp_path / "unsigned", 3)
    store.publish(tmp_path / "signed", signer=Signer.read(private))
    store.publish(tmp_path / "unsigned")
    store.set_label("tiny", "stable", 2)
    server = await serve(swap={"trusted_keys": (public,)})
    call = calls(server)
    store.set_label("tiny", "stable", 3)
    await eventually(lambda: held(server, 3) == "failed", 30)
    assert "tiny@3 is not signed; publish it with --sign" in await call.reason(3)
    assert await call.version() == 2


async def test_actions_are_recorded_into_the_sequences_of_every_version_in_memory(serve, store, tmp_path):
    more = tiny.changed(tiny.ACTIONS, version=2)
    server = await serve(record_actions=True, labels=("stable", "canary"))
    assert [s.group.ref for s in server.status.recorded] == ["actions@1"]
    publish(store, tmp_path, 2, sequence=more)
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: len(server.status.recorded) == 2, 30)
    store.set_label("tiny", "canary", 1)
    await eventually(lambda: [s.group.ref for s in server.status.recorded] == ["actions@1"], 30)
