"""The benchmark of tuning runs through, quickly: its times mean nothing here."""

from __future__ import annotations

from bench.harness import whole
from bench.tuning import tuning


def test_tuned_weights_are_compared_with_every_rival():
    raw = whole(tuning.measure(quick=True))
    assert raw["met"]
    assert {name: rival["tried"] for name, rival in raw["rivals"].items()} == {"by hand": 343, "random": 20, "TPE": 5}
    for instance in raw["instances"]:
        assert abs(instance["dual"] - instance["linear_program"]) < 1e-6
    assert len(tuning.conclude(raw).claims) == 8
    best = [rival["pinner"] for rival in raw["rivals"].values() if rival["pinner"] is not None]
    assert all(value <= raw["parties"]["pinner"]["after"] + 1e-3 for value in best)
