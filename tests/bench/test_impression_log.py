"""The log's cost is of all rounds together, and its interval says whether the rounds resolve it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.impressions.impression_log import _EXPLORE, _exploring, conclude
from bench.test_bed import CONFIG
from loadtest.open_loop import OK, STAGES, Samples
from loadtest.report import summarise
from model_store.bundle.files import EXPLORATION
from model_store.registry.store import open_model_store
from server.config_sources import load_config

_SERVERS = {"without": (0.6, 1.0), "also without": (0.6, 1.0), "weights": (0.65, 1.02), "order": (0.75, 1.5)}


def latencies_s(slower: float, rounds: int = 12) -> list[np.ndarray]:
    """Of each round, one of them with a neighbour on the machine, as every server would meet it."""
    rng = np.random.default_rng(3)
    found = [slower * rng.gamma(4, 0.002, 800) for _ in range(rounds)]
    found[5] = found[5] * 6
    return found


def raw():
    rounds = []
    for number in range(12):
        rounds.append({})
        for name, (own_ms, slower) in _SERVERS.items():
            latency_s = latencies_s(slower)[number]
            count = len(latency_s)
            nothing = np.zeros(count)
            stages = np.zeros((count, len(STAGES)), np.uint32)
            samples = Samples(nothing, nothing, latency_s, (OK,) * count, stages, ((),) * count, ("m@1",), 0.1)
            rounds[-1][name] = {
                "requests": count,
                "cpu_ms_per_request": 3.0,
                "own_cpu_ms_per_request": own_ms + 0.01 * (number % 3),
                "short": 0,
                "latency_hdr": summarise(samples, 2.0, 10.0).latency_hdr,
            }
    log = {"dropped": 0, "unfit": 0, "written": 1, "answered": 1, "explored": 1}
    return {"rate_per_s": 400.0, "rounds": rounds, "logs": {"weights": log, "order": {**log, "dropped": 2}}}


def test_the_estimate_is_of_all_rounds_and_lies_within_its_interval():
    found = conclude(raw())
    claims = {claim.name: claim for claim in found.claims}
    assert claims["weights: the log's CPU time a request"].measured == pytest.approx(0.05)
    assert claims["order: the log's CPU time a request"].measured == pytest.approx(0.15)
    assert claims["weights: P99 with the log / without it"].measured == pytest.approx(1.02, rel=0.003)
    assert claims["order: P99 with the log / without it"].measured == pytest.approx(1.5, rel=0.003)
    assert [claim.holds for claim in found.claims] == [True, True, False, False, False]
    for name, (_, slower) in _SERVERS.items():
        p99_ms = np.percentile(np.concatenate(latencies_s(slower)), 99) * 1e3
        assert found.summary[f"{name}: P99 of all rounds, ms"] == pytest.approx(p99_ms, rel=0.01)
    ratio = "order: P99 with the log / without it"
    assert found.summary["also without / without: P99"] == 1
    # A neighbour that all servers meet in the same round does not widen the interval of their ratio.
    assert 1.49 < found.summary[f"{ratio}, 95% from"] <= 1.5 <= found.summary[f"{ratio}, 95% to"] < 1.51


def test_rounds_that_differ_give_an_interval_that_says_so():
    measured = raw()
    measured["rounds"][5]["weights"], measured["rounds"][6]["weights"] = (
        measured["rounds"][number]["order"] for number in (5, 6)
    )
    measured["rounds"][5]["without"] = measured["rounds"][4]["without"]
    summary = conclude(measured).summary
    ratio = "weights: P99 with the log / without it"
    assert summary[f"{ratio}, 95% to"] - summary[f"{ratio}, 95% from"] > 0.5


def test_what_a_server_refused_counts_as_late():
    measured = raw()
    for one in measured["rounds"]:
        one["order"]["short"] = 9  # of 809: more than one in a hundred
    summary = conclude(measured).summary
    assert summary["order: refused or degraded"] == 108
    assert summary["order: P99 of all rounds, ms"] == 2_000
    assert summary["weights: P99 of all rounds, ms"] < 100


@pytest.mark.parametrize("kind", ["weights", "order"])
def test_the_servers_get_the_demos_versions_with_a_table_that_explores(tmp_path: Path, kind: str):
    settings, own = load_config(CONFIG), load_config(_exploring(CONFIG, tmp_path, _EXPLORE[kind]))
    assert (own.model, own.labels) == (settings.model, settings.labels)
    theirs, ours = open_model_store(settings.model_store), open_model_store(own.model_store)
    for label in settings.labels:
        one, other = (models.read(own.model, models.resolve(own.model, label)) for models in (theirs, ours))
        assert other.files == {**one.files, EXPLORATION: _EXPLORE[kind].encode()}
