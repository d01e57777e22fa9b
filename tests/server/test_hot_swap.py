"""Versions that come and go while requests are answered, on real stores, engines and channels."""

from __future__ import annotations

import asyncio
import collections

import grpc
import numpy as np
import onnx
import pytest

from feature_client.codec import encode_rows
from feature_client.opening import open_store
from kernels.numpy_engine import NumpyEngine
from model_store.manifest import Head, Surface
from model_store.objects import open_objects
from model_store.statistics import Distribution, Statistics
from model_store.store import open_model_store
from pinrank.v1 import models_pb2, models_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from server.config import GuardConfig, ShadowConfig, SwapConfig
from tests import tiny
from tests.conftest import eventually
from tests.server.gated import GatedEngine

TOKEN = "tell-nobody"
SWAP = SwapConfig(poll_s=0.05, retry_s=0.1, rank_correlation_min=-1)
#: The same network under other versions: they order alike.
ALIKE = tiny.network(seed=1)


@pytest.fixture
def store(tmp_path):
    """A store with tiny@1 as `stable`."""
    opened = open_model_store(tmp_path / "models")
    publish(opened, tmp_path, 1)
    opened.set_label("tiny", "stable", 1)
    return opened


def publish(store, tmp_path, version, **changes):
    folder = tmp_path / "bundles" / str(version)
    tiny.write_tiny_bundle(folder, version, **changes)
    return store.publish(folder)


@pytest.fixture
async def serve(start_server, store, tmp_path):
    """Start servers of the store, with settings changed."""
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")

    async def start(**changes):
        swap = changes.pop("swap", {})
        settings = {
            "model_store": store.where,
            "labels": ("stable", "canary", "shadow", "beta"),
            "admin_token_file": token,
            "swap": SWAP.model_copy(update=swap),
        }
        return await start_server(**settings | changes)

    return start


@pytest.fixture
async def calls():
    """Open stubs to servers."""
    channels = []

    class Calls:
        def __init__(self, server, token=TOKEN):
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}")
            channels.append(channel)
            self._ranking = ranking_pb2_grpc.RankingServiceStub(channel)
            self._models = models_pb2_grpc.ModelServiceStub(channel)
            self._metadata = (("authorization", f"Bearer {token}"),)

        async def rank(self, user=1, pins=range(1, 31), **fields):
            request = ranking_pb2.RankRequest(user_id=user, pin_ids=pins, surface="home", **fields)
            return await self._ranking.Rank(request, timeout=20)

        async def version(self, **fields):
            return (await self.rank(**fields)).versions.model_version

        async def do(self, name, **fields):
            request = getattr(models_pb2, f"{name}Request")(**fields)
            return await getattr(self._models, name)(request, timeout=20, metadata=self._metadata)

        async def status(self):
            return await self.do("Status")

        async def phases(self):
            return {one.version: one.phase for one in (await self.status()).versions}

        async def reason(self, version):
            return {one.version: one.reason for one in (await self.status()).versions}[version]

    yield Calls
    for channel in channels:
        await channel.close()


def held(server, version):
    found = server._swap.versions.get(version)
    return str(found.phase) if found else "gone"


def sample(server, metric, /, **labels):
    return server._metrics.registry.get_sample_value(metric, labels) or 0


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
        await eventually(lambda v=version: list(server._swap.versions) == [v], 30)
    stop.set()
    await asyncio.gather(*asking)
    assert set(seen) == {1, 2, 3}
    assert sample(server, "pinrank_model_swaps_total", outcome="done") == 5
    assert len(server._runner._costs) == len(server._installed) == 1


async def test_a_version_that_waits_for_its_last_request_is_kept_until_then(serve, store, tmp_path, monkeypatch, calls):
    monkeypatch.setattr("server.app.engine_factory", lambda _: GatedEngine)
    server = await serve(labels=("stable",), engine_streams=1)
    call = calls(server)
    engine = server._models.default.live.engine
    engine.runs.clear()
    engine.gate.clear()
    running = asyncio.ensure_future(call.rank())
    await eventually(lambda: len(engine.runs) == 1)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 1) == "draining", 20)
    assert server._models.default.version == 2
    engine.gate.set()
    assert (await running).versions.model_version == 1
    await eventually(lambda: held(server, 1) == "gone", 20)
    assert await call.version() == 2


async def test_a_run_whose_caller_hung_up_holds_its_version_too(serve, store, tmp_path, monkeypatch, calls):
    monkeypatch.setattr("server.app.engine_factory", lambda _: GatedEngine)
    server = await serve(labels=("stable",), engine_streams=2)
    call = calls(server)
    engine = server._models.default.live.engine
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
        server._swap._step()
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


def own_golden(content):
    """Golden requests that the network itself answers, so that nothing but what is tested is wrong."""
    return {"network.onnx": content, "golden.npz": tiny.encode_golden(tiny.golden(content, tiny.manifest_fields()))}


NO_ATTRIBUTES = tiny.UTILITY.replace(" * sqrt(pin.popularity)", "").encode()
BROKEN = {
    "golden scores": ({"network.onnx": tiny.network(seed=99)}, {}, "golden row"),
    "no network": ({"network.onnx": b"nothing"}, {}, "no ONNX network"),
    "hostile network": ({"network.onnx": loop_network()}, {}, "operator Loop is not run here"),
    "golden archive": ({"golden.npz": b"PK"}, {}, "no archive of arrays"),
    "utility": ({"utility.toml": b"broken"}, {}, "the utility table is not TOML"),
    "statistics": ({"statistics.json": b"{}"}, {}, "statistics.json: Field required"),
    "surface gone": (
        {"surfaces": (Surface(name="related", query=True),)}, {},
        "breaks callers of stable (tiny@1): surfaces.home: expected ranked, found gone",
    ),
    "head gone": (
        {"heads": (Head(name="save", meaning="other"), Head(name="hide", meaning="hid"))}, {},
        "heads.save.meaning: expected 'saved', found 'other'",
    ),
    "scores not finite": (own_golden(nan_network()), {}, "candidates of recent requests get no finite score"),
    "scores say nothing": (
        own_golden(flat_network()) | {"utility.toml": NO_ATTRIBUTES}, {},
        "gives every candidate of a recent request the same utility",
    ),
    "another order": (
        own_golden(tiny.network(seed=5)), {"swap": {"rank_correlation_min": 0.95}},
        "orders recent requests unlike what they were answered: rank correlation",
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
async def test_a_broken_version_fails_by_name_and_disturbs_nothing(fault, serve, calls, store, tmp_path):
    changes, settings, reason = BROKEN[fault]
    server = await serve(**settings)
    call = calls(server)
    for user in (1, 2, 3):
        await call.rank(user=user, pins=range(1, 51))
        server._edge._recent._noted_s = float("-inf")  # take the next one too
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
    assert len(server._installed) == len(server._runner._costs) == 1
    assert {cache.group.ref for cache in server._near.values()} == {"pin_core@1"}
    # The next good one is taken in, and the broken one forgotten.
    publish(store, tmp_path, 3, **{"network.onnx": ALIKE, **own_golden(ALIKE)})
    store.set_label("tiny", "stable", 3)
    await eventually(lambda: server._models.default.version == 3, 30)
    assert held(server, 2) == "gone"


async def test_a_damaged_store_fails_the_version_and_a_mended_one_heals_it(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    bundle = publish(store, tmp_path, 2)
    digest = bundle.manifest.files["network.onnx"].sha256
    objects = open_objects(store.where)
    store.set_label("tiny", "beta", 2)
    await eventually(lambda: held(server, 2) == "serving", 30)
    store.set_label("tiny", "beta", 1)
    await eventually(lambda: held(server, 2) == "gone", 30)
    store.set_label("tiny", "beta", 2)
    objects.put(f"tiny/blobs/{digest}", b"damaged")
    await eventually(lambda: held(server, 2) in {"failed", "serving"}, 30)
    assert await call.version() == 1


async def test_features_that_are_not_there_yet_delay_a_roll_over_and_no_request_mixes_spaces(
    serve, calls, store, tmp_path, redis_url
):
    """The label moves before the features are loaded: the version waits for them, and takes over once they are."""
    space = tiny.changed(tiny.SPACE, version=2)
    pins = tiny.changed(
        tiny.PINS, version=2, fields=(tiny.changed(tiny.PINS.fields[0], space=space), *tiny.PINS.fields[1:])
    )
    fields = {"groups": (pins, tiny.USERS)}
    url = redis_url.rsplit("/", 1)[0] + "/9"
    features = open_store(url)
    await features.start()
    await features.multi_put(tiny.features().items())
    server = await serve(swap={"accept_changes": ("inputs.query.space",)}, feature_store=url)
    call = calls(server)
    for user in (1, 2, 3):
        await call.rank(user=user)
        server._edge._recent._noted_s = float("-inf")
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
    await eventually(lambda: server._models.default.version == 2, 30)
    await eventually(lambda: any(a.versions.model_version == 2 for a in answers), 30)
    stop.set()
    await asking
    for answer in answers:
        group = {1: "pin_core@1", 2: "pin_core@2"}[answer.versions.model_version]
        assert group in answer.versions.feature_groups
        assert answer.degradation == ranking_pb2.Degradation()
    await eventually(lambda: held(server, 1) == "gone", 30)
    assert {cache.group.ref for cache in server._near.values()} == {"pin_core@2"}
    # Back again, while both are in the feature store: at once.
    store.rollback("tiny", "stable")
    await eventually(lambda: server._models.default.version == 1, 30)
    assert (await call.rank()).degradation == ranking_pb2.Degradation()


async def test_versions_held_by_number_answer_by_number_until_they_are_let_go(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2)
    with pytest.raises(grpc.aio.AioRpcError, match="version 2 is not served; there are 1"):
        await call.version(version=2)
    loaded = await call.do("Load", version=2)
    assert (loaded.phase, loaded.version) == ("serving", 2)
    assert await call.version(version=2) == 2
    assert await call.version() == 1
    await call.do("Unload", version=2)
    await eventually(lambda: held(server, 2) == "gone", 30)
    with pytest.raises(grpc.aio.AioRpcError, match="version 2 is not served"):
        await call.version(version=2)
    publish(store, tmp_path, 3, **{"network.onnx": b"nothing"})
    failed = await call.do("Load", version=3)
    assert (failed.phase, "no ONNX network" in failed.reason) == ("failed", True)


async def test_labels_move_by_call_and_errors_have_their_statuses(serve, calls, store, tmp_path, caplog):
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2)
    moved = await call.do("SetLabel", label="stable", version=2, by="anna", why="better", expected_version=1)
    entry = store.head("tiny")
    assert (moved.entry, entry.by, entry.why) == (entry.number, "anna", "better")
    await eventually(lambda: server._models.default.version == 2, 30)
    assert (await call.do("SetLabel", label="stable", version=2)).entry == 0
    for name, fields, code, text in (
        ("SetLabel", {"label": "stable", "version": 1, "expected_version": 1}, "ABORTED", "is version 2 by now, not 1"),
        ("SetLabel", {"label": "stable", "version": 9}, "NOT_FOUND", "has no version 9"),
        ("SetLabel", {"label": "NO", "version": 1}, "INVALID_ARGUMENT", "label 'NO'"),
        ("Load", {"version": 9}, "NOT_FOUND", "has no version 9"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.do(name, **fields)
        assert raised.value.code().name == code
        assert text in raised.value.details()


async def test_without_the_token_nothing_is_told_or_done(serve, calls, store):
    server = await serve()
    for token in ("", "wrong", TOKEN + "x"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls(server, token).status()
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_without_a_token_file_the_service_takes_no_calls(serve, calls, store):
    closed = await serve(admin_token_file=None)
    for token in ("", TOKEN):
        with pytest.raises(grpc.aio.AioRpcError, match="set admin_token_file") as raised:
            await calls(closed, token).do("SetLabel", label="stable", version=1)
        assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_several_processes_take_labels_but_no_load_of_one(serve, calls):
    server = await serve(processes=2)
    with pytest.raises(grpc.aio.AioRpcError, match="2 processes share this port"):
        await calls(server).do("Load", version=1)


async def test_users_stay_with_their_label_and_growing_a_share_takes_nobody_from_it(serve, calls, store, tmp_path):
    server = await serve(guard=GuardConfig(enabled=False))
    call = calls(server)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server._models.by_label, 30)

    async def on_canary(share):
        store.set_traffic("tiny", "*", "canary", share)
        number = store.head("tiny").number
        server._swap.look()
        await eventually(lambda: server._swap.entry.number == number)
        return {user for user in range(400) if await call.version(user=user, pins=[1, 2]) == 2}

    few, again, more, none = [await on_canary(share) for share in (0.1, 0.1, 0.4, 0.0)]
    assert few == again
    assert few < more
    assert none == set()
    assert 20 < len(few) < 65
    assert 120 < len(more) < 200
    assert await call.version(label="canary") == 2


async def test_the_shadow_is_compared_and_answers_nobody(serve, calls, store, tmp_path):
    server = await serve(shadow=ShadowConfig(share=1.0))
    call = calls(server)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "shadow", 2)
    await eventually(lambda: "shadow" in server._models.by_label, 30)
    for user in (1, 2, 3, 4) * 5:
        assert await call.version(user=user) == 1
        await eventually(lambda: not server._edge._shadow._tasks)
    shadow = (await call.status()).shadow
    assert (shadow.version, shadow.requests, shadow.failed) == (2, 20, 0)
    assert 0 <= shadow.top_10_overlap < 1  # another network, another order
    assert {head.head for head in shadow.heads} == {"save", "hide"}
    assert max(head.psi for head in shadow.heads) > 0.1
    assert sample(server, "pinrank_shadow_requests_total", outcome="compared") == 20
    assert sample(server, "pinrank_requests_total", surface="home", code="OK") == 20
    store.set_label("tiny", "shadow", 1)  # the same as what answers: nothing to compare
    await eventually(lambda: held(server, 2) == "gone", 30)


class FailingLater(NumpyEngine):
    """Fails requests, not proofs, once told."""

    failing: frozenset[int] = frozenset()

    def __init__(self, network, inputs, heads, streams=1, *, plan=None):
        super().__init__(network, inputs, heads, streams, plan=plan)
        self._own = network

    def run(self, batch):
        if self._own in self.failing:
            from kernels.engine import EngineError

            raise EngineError("told to fail")
        return super().run(batch)


GUARD = GuardConfig(requests_min=20, psi_max=0.8, p99_ratio_max=1_000)


@pytest.mark.parametrize("breach", ["errors", "drift"])
async def test_a_canary_that_breaches_its_guard_is_rolled_back_for_everybody_with_the_reason(
    breach, serve, calls, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("server.app.engine_factory", lambda _: FailingLater)
    network = ALIKE if breach == "errors" else tiny.network(seed=3)
    if breach == "errors":  # another file with the same content in other words
        model = onnx.load_model_from_string(ALIKE)
        model.producer_name = "another"
        network = model.SerializeToString()
    server = await serve(guard=GUARD)
    call = calls(server)
    publish(store, tmp_path, 2, **own_golden(network))
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server._models.by_label, 30)
    store.set_traffic("tiny", "*", "canary", 0.5)
    server._swap.look()
    await eventually(lambda: bool(server._models._traffic))
    if breach == "errors":
        monkeypatch.setattr(FailingLater, "failing", frozenset({network}))
    outcomes = collections.Counter()
    for user in range(10_000):
        try:
            outcomes[await call.version(user=user)] += 1
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.INTERNAL  # noqa: PT017
            outcomes["failed"] += 1
        if store.labels("tiny")["canary"] == 1:
            break
        server._swap._judged_s = float("-inf")
        server._swap.look()
    entry = store.head("tiny")
    assert entry.by.startswith("guard of ")
    assert entry.why.startswith("rolled back from 2: ")
    assert {"errors": "of its requests failed", "drift": "probabilities moved by"}[breach] in entry.why
    await eventually(lambda: held(server, 2) == "gone", 30)
    assert sample(server, "pinrank_model_rollbacks_total", label="canary") == 1
    for user in range(40):
        assert await call.version(user=user) == 1


async def test_a_store_that_cannot_be_read_leaves_everything_as_it_is(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    log = tmp_path / "models" / "tiny" / "log"
    newest = max(log.iterdir())
    damaged = log / f"{int(newest.stem) + 1:012}.json"
    damaged.write_text("{")
    await eventually(lambda: bool(server._swap.store_failure), 30)
    status = await call.status()
    assert "is damaged" in status.store_failure
    assert await call.version() == 1
    assert sample(server, "pinrank_model_store_failures_total") >= 1
    damaged.unlink()
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server._models.default.version == 2, 30)
    assert (await call.status()).store_failure == ""


async def test_a_removed_label_is_unknown_and_a_removed_default_goes_on(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2)
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: "canary" in server._models.by_label, 30)
    store.set_label("tiny", "canary", None)
    await eventually(lambda: held(server, 2) == "gone", 30)
    with pytest.raises(grpc.aio.AioRpcError, match="unknown label 'canary'; this server serves stable"):
        await call.rank(label="canary")
    store.set_label("tiny", "stable", None)
    number = store.head("tiny").number
    await eventually(lambda: server._swap.entry.number == number, 30)
    assert await call.version() == 1


async def test_a_broken_canary_does_not_keep_a_server_from_starting(serve, calls, store, tmp_path):
    publish(store, tmp_path, 2, **{"network.onnx": b"nothing"})
    store.set_label("tiny", "canary", 2)
    server = await serve()
    assert (await calls(server).phases()) == {1: "serving", 2: "failed"}


async def test_only_signed_bundles_are_served_where_keys_are_trusted(serve, calls, store, tmp_path):
    from model_store.signing import Signer
    from tests.model_store.test_store import _key

    private, public = _key(tmp_path, "anna")
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


async def test_status_says_what_was_checked_and_done(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    await call.rank(pins=range(1, 31))
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: list(server._swap.versions) == [2], 30)
    status = await call.status()
    (version,) = status.versions
    checks = "\n".join(version.checks)
    for expected in (
        "ABI: callers need not change", "features: 0.0% of 30", "golden scores: good, in a process of its own",
        "finite for all 30", "rank correlation", "memory: about",
    ):  # fmt: skip
        assert expected in checks
    assert version.memory_bytes > 0
    assert [event.text for event in status.events][-3:] == ["stable: 1 -> 2", "1 draining", "1 gone"]
    (label,) = [one for one in status.labels if one.label == "stable"]
    assert (label.version, label.wanted_version) == (2, 2)


async def test_drift_from_the_training_is_a_metric(serve, calls, store, tmp_path):
    """Trained on pins as popular as these, and on probabilities that nothing gives any more."""
    rng = np.random.default_rng(0)
    trained = Statistics(
        rows=1_000,
        inputs={"pin_core.popularity": Distribution.of(rng.uniform(size=1_000)), "gone.field": Distribution.of([1.0])},
        heads={"save": Distribution.of(rng.uniform(0.98, 0.99, 1_000)), "other": Distribution.of([0.5])},
    )
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2, **{"statistics.json": trained.model_dump_json().encode()})
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server._models.default.version == 2, 30)
    assert (
        sample(server, "pinrank_model_drift_psi", version="2", kind="head", name="save") == 0
    )  # nothing was asked yet
    for _ in range(20):
        await call.rank(pins=range(1, 51))
    assert sample(server, "pinrank_model_drift_psi", version="2", kind="head", name="save") > 1
    assert 0 < sample(server, "pinrank_model_drift_psi", version="2", kind="input", name="pin_core.popularity") < 1
    drifts = server._metrics.registry.get_sample_value
    assert drifts("pinrank_model_drift_psi", {"version": "2", "kind": "input", "name": "gone.field"}) is None
    assert sample(server, "pinrank_model_phase", version="2", phase="serving") == 1


async def test_actions_are_recorded_into_the_sequences_of_every_version_in_memory(serve, store, tmp_path):
    more = tiny.changed(tiny.ACTIONS, version=2)
    server = await serve(record_actions=True, labels=("stable", "canary"))
    assert [s.group.ref for s in server._activity._sequences] == ["actions@1"]
    publish(store, tmp_path, 2, sequence=more)
    store.set_label("tiny", "canary", 2)
    await eventually(lambda: len(server._activity._sequences) == 2, 30)
    store.set_label("tiny", "canary", 1)
    await eventually(lambda: [s.group.ref for s in server._activity._sequences] == ["actions@1"], 30)
