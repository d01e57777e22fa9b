from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bench.features.synthetic import PINS, fill
from bench.harness import BenchmarkError, Claim, run, whole
from bench.processes import cpu_seconds, server_process
from bench.serving import capacity, overload
from bench.serving.serving import DEADLINES, conclude, deadline_ms, goodput_claims, measure
from bench.test_bed import on_a_quiet_machine
from feature_client.features import MissingFeatures
from feature_client.fetch import fetch
from feature_client.stores.memory_store import MemoryStore
from model_store.registry.store import open_model_store
from tests import tiny


async def test_filled_features_leave_nothing_missing(model_store):
    store = MemoryStore()
    bundle = open_model_store(model_store).read("tiny", 1)
    user_ids, pin_ids = await fill(store, bundle, users=5, seed=0)
    assert user_ids.tolist() == [1, 2, 3, 4, 5]
    for user_id in user_ids.tolist():
        fetched = await fetch(store, bundle.manifest.needs, user_id, pin_ids[:100])
        assert fetched.missing() == MissingFeatures(user=False, candidates=0, event_pins=0, query_pin=False, foreign=0)
        assert len(fetched.events) == bundle.manifest.sequence_length


async def test_filled_features_are_the_same_for_the_same_seed(model_store):
    bundle = open_model_store(model_store).read("tiny", 1)
    stores = [MemoryStore() for _ in range(3)]
    for store, seed in zip(stores, (1, 1, 2), strict=True):
        await fill(store, bundle, users=3, seed=seed)
    assert stores[0].values == stores[1].values != stores[2].values


async def test_pins_and_vectors_come_from_the_bundle_where_it_has_them(model_store, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, tiny.DIM)).astype(np.float16)
    np.savez(tmp_path / "embeddings.npz", pin_ids=np.array([7, 70, 700], np.uint64), vectors=vectors)
    folder = tmp_path / "bundle"
    tiny.write_tiny_bundle(folder, 9, **{"embeddings.npz": (tmp_path / "embeddings.npz").read_bytes()})
    models = open_model_store(tmp_path / "models")
    models.publish(folder)
    store = MemoryStore()
    _, pin_ids = await fill(store, models.read("tiny", 9), users=1, seed=0)
    assert pin_ids.tolist() == [7, 70, 700]
    fetched = await fetch(store, tiny.manifest().needs, 1, pin_ids)
    found = fetched.candidate_rows("pin_core")["embedding"]
    assert np.array_equal(found, vectors)


async def test_a_bundle_without_embeddings_gets_made_up_pins(model_store):
    _, pin_ids = await fill(MemoryStore(), open_model_store(model_store).read("tiny", 1), users=1, seed=0)
    assert pin_ids.tolist() == list(range(1, PINS + 1))


def test_a_server_that_cannot_start_says_why_and_leaves_no_process(config_file, tmp_path):
    with (
        pytest.raises(BenchmarkError, match="no feature store"),
        server_process(config_file, f"lmdb://{tmp_path / 'nowhere'}", tmp_path / "server.log"),
    ):
        pytest.fail("a server without its store must not be handed out")


def test_a_server_that_is_not_ready_in_time_says_so_and_leaves_no_process(config_file, tmp_path):
    log = tmp_path / "server.log"
    with (
        pytest.raises(BenchmarkError, match="not ready within 0 s"),
        server_process(config_file, "memory://", log, start_s=0.0),
    ):
        pytest.fail("a server that is not ready must not be handed out")
    assert str(config_file) not in _command_lines()


def _command_lines() -> str:
    """Return what runs on this machine."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(file.read_text(errors="replace"))
    return "\n".join(found)


def test_a_server_is_gone_after_a_failure_in_the_measurement(config_file, tmp_path):
    found = []

    def fail(pid: int) -> None:
        assert cpu_seconds(pid) > 0
        found.append(pid)
        raise ValueError("the measurement failed")

    with (
        pytest.raises(ValueError, match="the measurement failed"),
        server_process(config_file, "memory://", tmp_path / "server.log") as (_, pid, _),
    ):
        fail(pid)
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


def test_a_quick_run_measures_every_part_and_keeps_no_path(config_file, tmp_path):
    raw, concluded = run("serving", lambda: measure(quick=True, config=config_file), conclude, tmp_path / "results")
    (only,) = raw["rounds"]
    assert only["saturated"]["degraded"] == only["lone"]["degraded"] == 0
    assert set(only["lone"]["statuses"]) == {"OK"}
    assert all(value >= 0 for value in concluded.summary.values() if value is not None)
    assert len(concluded.claims) == 12
    assert only["goodput"].keys() == DEADLINES.keys()
    one_run_ms = raw["setup"]["one_run_ms"]
    assert raw["setup"]["deadlines_ms"] == {name: deadline_ms(name, one_run_ms) for name in DEADLINES}
    assert all(tried["offered_per_s"] > 0 for found in only["goodput"].values() for tried in found["tried"])
    text = (tmp_path / "results" / "serving.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["raw"]["setup"]["streams"] == 2


def test_settings_from_the_environment_are_refused(config_file, monkeypatch):
    monkeypatch.setenv("PINRANK_ENGINE", "numpy")
    with pytest.raises(BenchmarkError, match="PINRANK_ENGINE"):
        whole(measure(quick=True, config=config_file))


def test_nothing_timed_is_judged_where_something_else_ran():
    claims = (Claim("saturated over engine alone", 3.1, 0.92, "ratio", "at_least"),)
    assert on_a_quiet_machine(claims, got=1.9, meant=2) == claims
    (claim,) = on_a_quiet_machine(claims, got=0.25, meant=2)
    assert (claim.measured, claim.holds) == (None, False)
    assert claim.unjudged == "the machine was not quiet: the engine alone got 0.25 of 2 cores"


def test_goodput_over_a_rival_that_holds_no_rate_is_not_judged():
    over_plain, over_ideal = goodput_claims("tight", good=5.0, plain=0.0, ideal=0.0)
    assert (over_plain.measured, over_plain.unjudged) == (None, "plain grpc.aio holds no rate")
    assert (over_ideal.measured, over_ideal.unjudged) == (None, "the ideal queue holds no rate")
    _, over_ideal = goodput_claims("tight", good=5.0, plain=4.0, ideal=None)
    assert over_ideal.unjudged == "the ideal queue is one of two streams"
    over_plain, over_ideal = goodput_claims("loose", good=0.0, plain=4.0, ideal=8.0)
    assert (over_plain.measured, over_ideal.measured) == (0.0, 0.0)
    assert not over_plain.holds


def test_capacity_is_measured_for_every_number_of_candidates(config_file):
    raw = whole(capacity.measure(quick=True, config=config_file))
    (only,) = raw["rounds"]
    assert [int(count) for count in only] == list(capacity.CANDIDATES)
    assert all(found["degraded"] == 0 and found["memory"]["own_bytes"] > 1e6 for found in only.values())
    summary = capacity.conclude(raw).summary
    core_ms, rows_per_s = (summary[f"500 candidates, {what}"] for what in ("core-ms a request", "rows/s a core"))
    assert core_ms * rows_per_s == pytest.approx(500e3)


def test_an_overload_is_measured_beside_an_echo(config_file):
    raw = whole(overload.measure(quick=True, config=config_file))
    (only,) = raw["rounds"]
    assert all(step["echo_ms"]["p99"] > 0 for step in only["steps"])
    only["engine_alone_cores"] = float(raw["cores"])
    claims = {claim.name: claim for claim in overload.conclude(raw).claims}
    (refusals,) = (claim for name, claim in claims.items() if name.startswith("P99 of refusals"))
    assert (refusals.measured is None) == all(
        step["refused_ms"] is None for step in only["steps"] if step["factor"] == 3
    )


def test_a_deadline_is_a_multiple_of_a_run_and_never_shorter_than_a_call_takes():
    assert (deadline_ms("tight", 4.0), deadline_ms("loose", 4.0)) == (10.0, 24.0)
    assert (deadline_ms("tight", 0.5), deadline_ms("loose", 0.5)) == (5.0, 10.0)
