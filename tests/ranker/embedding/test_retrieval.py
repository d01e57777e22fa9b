"""Retrieval against a search that looks at one pin after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.data.users.interests import InterestSettings
from ranker.embedding import retrieval as module
from ranker.embedding.retrieval import (
    NOWHERE,
    by_interests,
    by_popularity,
    by_vectors,
    questions,
    ranked,
    ranked_by_best_interest,
    recall_difference,
    retrieval,
)
from ranker.errors import DatasetError
from tests.ranker.embedding.edges import EdgeList

KNOWN = EdgeList([(1, 10), (1, 11), (1, 11), (2, 12), (3, 10), (4, 13), (4, 11)])
HELD = EdgeList([(1, 12), (1, 11), (2, 10), (2, 14), (5, 10), (4, 15)])


def vectors(pins: dict[int, list[float]]) -> PinEmbeddings:
    held = np.array(list(pins.values()), np.float32)
    space = EmbeddingSpace(name="toy", version=1, dim=held.shape[1], dtype="float32")
    return PinEmbeddings(np.array(list(pins), np.uint64), held, space)


def test_questions_are_contexts_with_known_and_with_held_out_pins():
    asked = questions(KNOWN, HELD, [vectors({99: [1.0]})])
    assert asked.pin_ids.tolist() == [10, 11, 12, 13, 14, 15, 99]
    assert asked.counts.tolist() == [2, 2, 1, 1, 0, 0, 0]  # an edge counts once
    assert asked.contexts == 3  # 1, 2 and 4: of 3 nothing is held out, of 5 nothing is known
    number, pins = asked.held.of(np.array([2, 0, 1]))
    assert number.tolist() == [0, 1, 2, 2]
    assert asked.pin_ids[pins].tolist() == [15, 12, 10, 14]  # 11 is known of 1
    assert asked.pin_ids[asked.known.of(np.array([0]))[1]].tolist() == [11, 10]
    with pytest.raises(DatasetError, match="no context has both known and held-out pins"):
        questions(KNOWN, EdgeList([(9, 10)]))
    assert questions(KNOWN, HELD, contexts_max=2).contexts == 2


def test_pins_without_a_vector_cannot_be_found_and_contexts_without_one_find_nothing():
    held = vectors({10: [1, 0], 12: [1, 1], 14: [0, 0], 15: [0, 1]})
    asked = questions(KNOWN, HELD, [held])
    scorer = by_vectors(asked, held)
    found = ranked(asked, scorer)
    # 1 asks with 10 and finds 12 first; 2 asks with 12 and finds 10, as good as 15; 14 has no vector; neither have 11
    # and 13, with which 4 asks.
    assert found.ranks.tolist() == [0, 0, NOWHERE, NOWHERE]
    measured = retrieval(asked, found, scorer, resamples=0)
    assert measured.coverage == 3 / 6
    assert measured.recall[10].value == pytest.approx((1 + 0.5 + 0) / 3)
    assert measured.mrr.value == pytest.approx((1 + 1 + 0) / 3)
    assert {low: measured.slices[low].value for low in (0, 1)} == {0: 0.0, 1: 1.0}
    assert measured.slices[10].value is None


@given(seed=st.integers(0, 1000), dim=st.integers(1, 3), scores_max=st.sampled_from([1, 50, 1 << 24]))
def test_ranks_are_those_of_a_slow_search(seed, dim, scores_max):
    rng = np.random.default_rng(seed)
    pins, contexts = 15, 6
    known, held = (
        EdgeList(list(zip(rng.integers(contexts, size=25).tolist(), rng.integers(pins, size=25).tolist(), strict=True)))
        for _ in range(2)
    )
    # Whole numbers: many scores are equal, and sums are exact in any order.
    numbers = rng.integers(-2, 3, (pins, dim)).astype(float)
    held_vectors = vectors({pin: numbers[pin].tolist() for pin in range(pins)})
    asked = questions(known, held, [held_vectors])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCORES_MAX", scores_max)
        found = ranked(asked, by_vectors(asked, held_vectors))
    expected, shown = [], set()
    for context in range(contexts):
        own = sorted({pin for c, pin in known.edges if c == context})
        right = sorted({pin for c, pin in held.edges if c == context} - set(own))
        if not own or not right:
            continue
        query = numbers[own].sum(axis=0)
        findable = [pin for pin in range(pins) if pin not in own and numbers[pin].any()] if query.any() else []
        order = sorted(findable, key=lambda pin, query=query: (-(numbers[pin] @ query), pin))
        expected += [order.index(pin) if pin in order else NOWHERE for pin in right]
        shown |= set(order[:10]) if len(order) <= 10 else set()
    assert found.ranks.tolist() == expected
    assert shown <= set(np.flatnonzero(found.shown).tolist())


def test_interests_ask_with_each_of_their_medoids_and_not_with_their_mean():
    held = vectors({10: [1, 0], 11: [0, 1], 12: [1, 1], 13: [1, 0.1], 14: [-0.1, 1], 15: [0, 0]})
    known, right = EdgeList([(1, 10), (1, 11), (2, 15)]), EdgeList([(1, 13), (1, 14), (2, 10)])
    asked = questions(known, right, [held])
    by_mean = ranked(asked, by_vectors(asked, held))
    assert by_mean.ranks.tolist() == [1, 2, NOWHERE]  # between both interests lies 12
    two = ranked(asked, by_interests(asked, held, InterestSettings(distance=0.5)))
    assert two.ranks.tolist() == [0, 1, NOWHERE]
    one = ranked(asked, by_interests(asked, held, InterestSettings(distance=0.5, clusters_max=1)))
    assert one.ranks.tolist() == [2, 0, NOWHERE]  # of equally large clusters, that of the last pin, 11
    assert by_interests(asked, held, InterestSettings()).findable.tolist() == [True] * 5 + [False]


def test_interests_are_those_of_a_contexts_last_pins():
    held = vectors({10: [1, 0], 11: [0, 1], 13: [1, 0.1], 14: [-0.1, 1]})
    last = InterestSettings(pins_max=1)
    for known in ([(1, 11), (1, 10)], [(1, 10), (1, 11), (1, 10)]):
        asked = questions(EdgeList(known), EdgeList([(1, 13), (1, 14)]), [held])
        assert ranked(asked, by_interests(asked, held, last)).ranks.tolist() == [0, 1]
        assert ranked_by_best_interest(asked, held, last).ranks.tolist() == [0, 1]
    asked = questions(EdgeList([(1, 10), (1, 11)]), EdgeList([(1, 13), (1, 14)]), [held])
    assert ranked(asked, by_interests(asked, held, last)).ranks.tolist() == [1, 0]
    pairs = vectors({10: [1, 0], 11: [0, 1], 13: [1, 0.1], 14: [-0.1, 1], 20: [1, 0.01], 21: [0.01, 1]})
    one = InterestSettings(distance=0.5, clusters_max=1)
    for known, ranks in (([10, 11, 21, 20], [0, 1]), ([20, 21, 11, 10], [0, 1]), ([10, 20, 11, 21], [1, 0])):
        asked = questions(EdgeList([(1, pin) for pin in known]), EdgeList([(1, 13), (1, 14)]), [pairs])
        found = ranked(asked, by_interests(asked, pairs, one)).ranks.tolist()
        assert found == ranks, "of equally large clusters, that with the last pin counts"


def test_a_cluster_counts_by_its_importance():
    held = vectors({10: [1, 0], 11: [0, 1], 12: [0.05, 1], 13: [1, 0.1], 14: [0.1, 1]})
    asked = questions(EdgeList([(1, 10), (1, 11), (1, 12)]), EdgeList([(1, 13), (1, 14)]), [held])
    scorer = by_interests(asked, held, InterestSettings(distance=0.5))
    numbers = held.vectors.astype(np.float64)
    unit = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    # Of two equally good pins of a cluster, the last is the medoid.
    near = {medoid: np.exp((unit[medoid] @ unit.T - 1) / 0.4) for medoid in (0, 2)}
    expected = near[0] / 3 + near[2] * 2 / 3
    assert scorer.scores(np.array([0]))[0] == pytest.approx(expected, rel=1e-2)
    assert ranked(asked, scorer).ranks.tolist() == [1, 0]


def test_an_oracle_takes_the_cluster_that_finds_a_pin_first():
    held = vectors({10: [1, 0], 11: [0, 1], 12: [1, 1], 13: [1, 0.1], 14: [-0.1, 1], 15: [0, 0], 16: [0.2, 1]})
    known, right = EdgeList([(1, 10), (1, 11), (2, 15)]), EdgeList([(1, 13), (1, 14), (1, 16), (2, 10)])
    asked = questions(known, right, [held])
    # 10 answers 13, 12, 16, 14, and 11 answers 14, 16, 12, 13.
    two = ranked_by_best_interest(asked, held, InterestSettings(distance=0.5))
    assert two.ranks.tolist() == [0, 0, 1, NOWHERE]
    one = ranked_by_best_interest(asked, held, InterestSettings(distance=0.5, clusters_max=1))
    assert one.ranks.tolist() == [3, 0, 1, NOWHERE]  # 11 is the last pin
    merged = ranked(asked, by_interests(asked, held, InterestSettings(distance=0.5)))
    assert merged.ranks.tolist() == [0, 2, 1, NOWHERE]  # 16 is a little farther from 11 than 14, and nearer to 10
    assert two.shown.tolist() == [False, False, True, True, True, False, True]


def test_popularity_answers_alike_for_everybody():
    asked = questions(KNOWN, HELD)
    found = ranked(asked, by_popularity(asked))
    # 10 and 11 have two edges each, 12 and 13 one, 14 and 15 none. 1 knows the first two, 2 knows 12, 4 knows 11, 13.
    assert found.ranks.tolist() == [0, 0, 3, 3]


def test_the_difference_of_two_scorers_has_an_interval_of_the_same_contexts():
    rng = np.random.default_rng(3)
    edges = sorted(
        {(int(c), int(p)) for c, p in zip(rng.integers(300, size=4_000), rng.integers(100, size=4_000), strict=True)}
    )
    rng.shuffle(edges)
    known, held = EdgeList([*map(tuple, edges[:3_000])]), EdgeList([*map(tuple, edges[3_000:])])
    held_vectors = vectors({pin: rng.standard_normal(4).tolist() for pin in range(100)})
    asked = questions(known, held, [held_vectors])
    one, other = ranked(asked, by_vectors(asked, held_vectors)), ranked(asked, by_popularity(asked))
    same = recall_difference(asked, one, one, 10)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    differs = recall_difference(asked, one, other, 10)
    first, second = (retrieval(asked, ranks, by_popularity(asked)).recall[10].value for ranks in (one, other))
    assert differs.value == pytest.approx(first / second - 1)
    assert differs.low < differs.value < differs.high
