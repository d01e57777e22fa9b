"""Model stores that are damaged, exchanged or unreadable while a server follows them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from model_store.registry.open_objects import open_objects
from model_store.registry.store import ModelStore, open_model_store
from server.proving.prover import Prover
from tests import tiny
from tests.conftest import eventually
from tests.server.swapping import held, own_golden, publish, sample


async def test_a_damaged_store_fails_the_version_and_a_mended_one_heals_it(serve, calls, store, tmp_path):
    server = await serve(swap={"poll_s": 1.0})  # so that the store is damaged before the server looks again
    call = calls(server)
    bundle = publish(store, tmp_path, 2, **own_golden(tiny.network(seed=5)))
    digest = bundle.manifest.files["network.onnx"].sha256
    objects = open_objects(store.where)
    store.set_label("tiny", "stable", 2)
    objects.put(f"tiny/blobs/{digest}", b"damaged")
    await eventually(lambda: held(server, 2) == "failed", 30)
    assert "tiny@2: network.onnx was changed or damaged" in await call.reason(2)
    assert await call.version() == 1
    objects.put(f"tiny/blobs/{digest}", bundle.files["network.onnx"])
    store.set_label("tiny", "stable", 1)
    await eventually(lambda: held(server, 2) == "gone", 30)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server.status.default.version == 2, 30)


class SwappedStore(Prover):
    """Proves with a real helper; after the proof of version 2, another store takes the place of the first."""

    def __init__(self, folder, other):
        super().__init__("openvino", nice=0)
        self._folder, self._other = folder, other

    def prove(self, bundle, limits, sample):
        proof = super().prove(bundle, limits, sample)
        if bundle.manifest.version == 2:
            swap_places(self._folder, self._other)
        return proof


def swap_places(folder, other):
    before = folder.with_name("before")
    folder.rename(before)
    other.rename(folder)
    before.rename(other)


@pytest.fixture
def two_stores(store, tmp_path):
    """The store and another, whose tiny@2 has another network; and the bundles of both."""
    other = open_model_store(tmp_path / "other")
    publish(other, tmp_path / "first", 1)
    own = publish(store, tmp_path, 2, **own_golden(tiny.network(seed=5)))
    others = publish(other, tmp_path / "second", 2, **own_golden(tiny.network(seed=6)))
    for one in (store, other):
        one.set_label("tiny", "stable", 2)
    store.set_label("tiny", "stable", 1)
    return Path(store.where), Path(other.where), own, others


async def test_what_was_proven_is_served_whatever_becomes_of_the_store(serve, calls, store, two_stores):
    folder, other, own, others = two_stores
    with closing(SwappedStore(folder, other)) as prover:
        server = await serve(own_prover=prover)
        call = calls(server)
        assert await call.version() == 1
        store.set_label("tiny", "stable", 2)
        await eventually(lambda: server.status.default.version == 2, 30)
        assert (await call.rank()).versions.model_digest == own.digest != others.digest
        await server.drain_and_close()


async def test_a_bundle_that_changes_while_it_is_loaded_is_not_proven(serve, calls, store, two_stores, monkeypatch):
    folder, other, own, others = two_stores
    read = ModelStore.read

    def read_late(self, model, version, bytes_max=None):
        if bytes_max is not None and version == 2 and other.exists():  # the server, and not `set_label`
            swap_places(folder, other)
            other.rename(other.with_name("done"))
        return read(self, model, version, bytes_max)

    server = await serve(swap={"retry_s": 1.0})
    call = calls(server)
    monkeypatch.setattr(ModelStore, "read", read_late)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: held(server, 2) == "failed", 30)
    reason = await call.reason(2)
    assert (
        f"changed in the store while it was loaded: the digest was {own.digest}, and is now {others.digest}" in reason
    )
    await eventually(lambda: server.status.default.version == 2, 30)
    assert (await call.rank()).versions.model_digest == others.digest


async def test_a_store_that_cannot_be_read_leaves_everything_as_it_is(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    log = tmp_path / "models" / "tiny" / "log"
    newest = max(log.iterdir())
    damaged = log / f"{int(newest.stem) + 1:012}.json"
    damaged.write_text("{")
    await eventually(lambda: bool(server.status.store_failure), 30)
    status = await call.status()
    assert "is damaged" in status.store_failure
    assert await call.version() == 1
    assert sample(server, "pinrank_model_store_failures_total") >= 1
    damaged.unlink()
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: server.status.default.version == 2, 30)
    assert (await call.status()).store_failure == ""
