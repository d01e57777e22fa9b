from __future__ import annotations

from pathlib import Path

from bench.engines.fusion_latency import DEFAULT
from bench.engines.lift import Course
from bench.harness import run
from bench.rankers.size_curve import conclude, measure
from ranker.baselines.scores import TREES
from tests.ranker.interactions import write_atomic


def test_every_number_of_requests_trains_a_network_and_trees(tmp_path: Path) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    raw, concluded = run(
        "size_curve",
        lambda: measure(quick=True, courses=(Course("toy", "toy", "save"),), data=tmp_path),
        conclude,
        tmp_path / "results",
    )
    few, more = raw["toy"]
    assert 0 < few["requests"] < more["requests"]
    for point in (few, more):
        assert all(found[scorer] is not None for found in point["heads"].values() for scorer in (DEFAULT, TREES))
    assert len(concluded.claims) == 1
    assert concluded.claims[0].measured is not None
    table = (tmp_path / "results" / "size_curve.md").read_text()
    assert table.count("LightGBM") == 2
