"""Walks against the personalised PageRank that they estimate, solved exactly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranker.embedding.graph.graph import Graph, Side
from ranker.embedding.graph.walks import WalkSettings, neighbours_of, visits
from tests.ranker.embedding.edges import EdgeList, graph_of, random_edges

SMALL = EdgeList([(1, 10), (1, 11), (2, 11), (2, 12), (2, 12), (3, 12), (3, 13), (3, 10), (4, 14), (1, 14), (5, 15)])


def dense(graph: Graph) -> np.ndarray:
    """Return float64[P, P], the probability of a step from each pin to each other one."""

    def half(side: Side, ends: int) -> np.ndarray:
        made = np.zeros((len(side.starts) - 1, ends))
        for node, (first, stop) in enumerate(zip(side.starts[:-1], side.starts[1:], strict=True)):
            for other in side.others[first:stop]:
                made[node, other] += 1 / (stop - first)
        return made

    pins, contexts = len(graph.pin_ids), len(graph.contexts.starts) - 1
    step: np.ndarray = half(graph.pins, contexts) @ half(graph.contexts, pins)
    return step


def page_rank(graph: Graph, restart: float) -> np.ndarray:
    """Return float64[P, P], the personalised PageRank of each pin: restart * (I - (1 - restart) * step)^-1."""
    pins = len(graph.pin_ids)
    exact: np.ndarray = restart * np.linalg.inv(np.eye(pins) - (1 - restart) * dense(graph))
    return exact


def counted(graph: Graph, settings: WalkSettings) -> np.ndarray:
    """Return float64[P, P], visits of each pin by the walks from each pin."""
    pins = len(graph.pin_ids)
    found = np.zeros((pins, pins))
    start, pin, count = visits(graph, np.arange(pins), settings)
    found[start, pin] = count
    return found


@pytest.mark.parametrize("restart", [0.2, 0.5, 1.0])
def test_the_frequencies_of_visits_are_the_personalised_page_rank_within_3_sigma(tmp_path, restart):
    graph = graph_of(tmp_path, SMALL)
    walks, rounds = 4_000, 40
    found = np.stack([counted(graph, WalkSettings(walks, restart, seed=seed)) for seed in range(rounds)]) / walks
    # A walk that begins with a step visits a pin (page rank - restart, if it is its own) / restart / (1 - restart)
    # times; with a restart after every step, it is that step.
    rank = page_rank(graph, restart)
    exact = dense(graph) if restart == 1 else (rank - restart * np.eye(len(rank))) / restart / (1 - restart)
    sigma = found.std(axis=0, ddof=1) / np.sqrt(rounds)
    assert (np.abs(found.mean(axis=0) - exact) <= 3 * sigma + 1e-12).all()
    assert (sigma < 0.02 * np.maximum(exact, 0.1)).all()


@given(cuts=st.lists(st.integers(0, 200), max_size=6), at_once=st.integers(1, 300))
def test_any_division_of_the_pins_gives_the_same_neighbours(tmp_path_factory, cuts, at_once):
    with pytest.MonkeyPatch.context() as patch:
        graph = graph_of(tmp_path_factory.mktemp("graph"), random_edges(1, 40, 200, 800))
        settings = WalkSettings(walks=9, neighbours=5, seed=4)
        whole = neighbours_of(graph, np.arange(200), settings)
        patch.setattr("ranker.embedding.graph.walks._WALKS_MAX", at_once)
        bounds = sorted({0, 200, *cuts})
        parts = [neighbours_of(graph, np.arange(a, b), settings) for a, b in pairwise(bounds)]
        for name in ("pins", "weights"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        counts = np.concatenate([np.diff(part.splits) for part in parts])
        assert np.array_equal(counts, np.diff(whole.splits))


def test_the_walks_of_a_pin_do_not_depend_on_pins_that_they_do_not_meet(tmp_path):
    settings = WalkSettings(walks=50, seed=3)
    before = neighbours_of(graph_of(tmp_path / "a", SMALL), np.arange(6), settings)
    graph = graph_of(tmp_path / "b", EdgeList([(0, 1), (0, 2), *SMALL.edges]))
    after = neighbours_of(graph, np.arange(2, 8), settings)
    assert np.array_equal(after.pins - 2, before.pins)
    assert np.array_equal(after.weights, before.weights)


def test_neighbours_are_the_most_visited_other_pins_with_their_shares(tmp_path):
    graph = graph_of(tmp_path, SMALL)
    settings = WalkSettings(walks=300, neighbours=2, seed=1)
    found, counts = neighbours_of(graph, np.arange(6), settings), counted(graph, settings)
    np.fill_diagonal(counts, 0)
    for pin in range(6):
        own = slice(found.splits[pin], found.splits[pin + 1])
        nearest = sorted((-count, other) for other, count in enumerate(counts[pin]) if count)[:2]
        assert found.pins[own].tolist() == [other for _, other in nearest]
        assert found.weights[own] == pytest.approx([-count / counts[pin].sum() for count, _ in nearest])
    # The last pin shares its only context with no other.
    assert found.splits[5] == found.splits[6]
    assert (found.pins[found.splits[0] : found.splits[1]] != 0).all()


def test_another_seed_gives_other_walks(tmp_path):
    graph, settings = graph_of(tmp_path, random_edges(1, 40, 200, 800)), WalkSettings(walks=9, neighbours=5, seed=4)
    one, other = (neighbours_of(graph, np.arange(200), replace(settings, seed=seed)) for seed in (4, 2**63))
    assert not np.array_equal(one.pins, other.pins)
