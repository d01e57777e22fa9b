from __future__ import annotations

import numpy as np
import pytest

from bench.harness import whole
from bench.serving import swap_kills, swaps_broken
from bench.serving.broken_bundles import FAULTS
from bench.serving.swaps import slope_with_error
from kernels.cpu.numpy_engine import NumpyEngine
from model_store.bundle.files import BundleError, read_bundle, write_bundle
from model_store.model.loaded import load_model
from model_store.model.utility import UtilityError, load_utility
from tests import tiny

#: What only a server finds out: what its callers and its feature store need, and what became of the store.
ELSEWHERE = {"surface gone", "features missing", "damaged file"}


def test_the_slope_of_noise_is_none_and_a_leak_is_one():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=150)) * 0.1 + rng.normal(size=150)
    leak = walk + 0.2 * np.arange(150)
    noise = rng.normal(size=150)
    for values, leaks in ((noise, False), (leak, True)):
        slope, error = slope_with_error(values * 1e6)
        assert (abs(slope) > error) == leaks
    assert slope_with_error(leak)[0] == pytest.approx(slope_with_error(walk)[0] + 0.2)
    assert slope_with_error(np.zeros(2))[1] == float("inf")


@pytest.mark.parametrize("name", sorted(set(FAULTS) - ELSEWHERE - {"takes all memory"}))
def test_every_fault_is_one(name, tmp_path):
    tiny.write_tiny_bundle(tmp_path / "good", 1)
    bundle = read_bundle(tmp_path / "good")
    fields, files, _ = FAULTS[name](bundle, 2)
    own = {field: getattr(bundle.manifest, field) for field in type(bundle.manifest).model_fields if field != "files"}
    write_bundle(tmp_path / "bad", {**own, "version": 2, **fields}, {**bundle.files, **files})
    with pytest.raises((BundleError, UtilityError)):
        load_utility(load_model(read_bundle(tmp_path / "bad"), NumpyEngine, streams=1).utility_toml, bundle.manifest)


def test_a_quick_run_swaps_good_and_broken_versions_and_nobody_fails(config_file):
    run = whole(swaps_broken.measure(quick=True, config=config_file))
    assert (run["failed"], run["degraded"], run["versions_invalid"], run["mistaken"]) == ({}, {}, 0, {})
    assert len(run["swaps"]) == 5
    assert run["during_ms"]["requests"] > 0
    assert run["between_ms"]["requests"] > 0
    assert list(run["faults"]) == ["golden scores"]
    assert "golden row" in run["faults"]["golden scores"]


def test_a_quick_run_of_kills_loses_nothing(config_file):
    raw = whole(swap_kills.measure(quick=True, config=config_file))
    assert len(raw["kills"]) == 2
    assert all(claim.holds for claim in swap_kills.conclude(raw).claims)
