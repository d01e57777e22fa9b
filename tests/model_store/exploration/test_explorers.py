"""The explorers against slow references, and their stated probabilities against a million draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from impressions.writing.batches import impressions_batch
from impressions.writing.rows import Exploring
from model_store.exploration.explorer import Explored, Tuned, Withheld, replay_by_utility
from model_store.exploration.hashing import mixed, mixed_all
from model_store.exploration.orders import OrderExplorer
from model_store.exploration.plackett_luce import order_probability, position_probabilities
from model_store.exploration.regret import TunedOrder
from model_store.exploration.weights import WeightsExplorer
from model_store.model.discount import discounts
from model_store.model.selection import select
from model_store.model.utility import weighted_sum
from tests.impressions.answers import ToyScores
from tests.impressions.answers import answered as answered_request

SEED, DRAWS = 11, 1_000_000
TUNED = np.array([1.0, 0.5])
IDS = np.random.default_rng(5).integers(1, 1 << 64, DRAWS, dtype=np.uint64)


def weights_explorer(arms, share=0.5, regret_max=1.0, probabilities=None):
    given = np.array(probabilities or [1 / len(arms)] * len(arms))
    names = tuple(f"arm{i}" for i in range(len(arms)))
    return WeightsExplorer(SEED, share, regret_max, TUNED, names, np.array(arms, float), given)


def order_explorer(best=4, share=0.5, regret_max=1.0, temperature=0.3, floor=0.1):
    return OrderExplorer(SEED, share, regret_max, TUNED, best, temperature, floor)


def asked(explorer, parties, request_id, top_k=0, pins=None):
    pins = np.arange(1, len(parties) + 1, dtype=np.uint64) * 977 if pins is None else pins
    return explorer.explore(request_id, pins, parties, weighted_sum(parties, TUNED), top_k)


def order_of(decision, parties, top_k):
    return decision.order if isinstance(decision, Explored) else select(weighted_sum(parties, TUNED), top_k)


def exploring(explorer, count=300):
    return [number for number in range(1, 20 * count) if explorer.explores(number)][:count]


def value(order, utilities):
    worth = np.where(np.isfinite(utilities), utilities, 0).astype(float)[list(order)]
    return math.fsum(d * w for d, w in zip(discounts(len(order)), worth, strict=True))


def bound(parties, top_k, regret_max):
    utilities = weighted_sum(parties, TUNED)
    return regret_max * value(select(utilities, top_k), np.abs(utilities))


def enumerated(explorer, parties, top_k):
    """Return the probability of each answer, from nothing but the definition of the policy."""
    utilities = weighted_sum(parties, TUNED)
    tuned = tuple(select(utilities, top_k).tolist())
    found = {tuned: 1 - explorer.share}
    limit = bound(parties, top_k, explorer.regret_max)

    def add(order, probability):
        found[order] = found.get(order, 0.0) + explorer.share * probability

    if isinstance(explorer, WeightsExplorer):
        for weights, probability in zip(explorer.weights, explorer.probabilities, strict=True):
            order = tuple(select(weighted_sum(parties, weights), top_k).tolist())
            add(order if value(tuned, utilities) - value(order, utilities) <= limit else tuned, probability)
        return found
    ranked = [row for row in select(utilities).tolist() if np.isfinite(utilities[row])][: explorer.best]
    count = len(tuned)
    while len(ranked) > 1:
        worst = (ranked[::-1] + list(tuned)[len(ranked) :])[:count]
        if value(tuned, utilities) - value(worst, utilities) <= limit:
            break
        ranked.pop()
    if len(ranked) < 2:
        add(tuned, 1.0)
        return found
    # 80 bits hold exp(-10,000).
    exact = utilities[ranked].astype(np.longdouble)
    worth = np.exp((exact - exact[0]) / explorer.temperature)
    for order in itertools.permutations(range(len(ranked))):
        probability, left = 1.0, dict(enumerate(worth))
        for place in order:
            probability *= worth[place] / sum(left.values())
            del left[place]
        whole = (explorer.floor / math.factorial(len(order))) + (1 - explorer.floor) * probability
        add(tuple(([ranked[place] for place in order] + list(tuned)[len(order) :])[:count]), float(whole))
    return found


WEIGHTS = weights_explorer([[1.0, 0.0], [1.0, 2.0], [1.0, 0.5], [-1.0, 3.0]], probabilities=[0.4, 0.3, 0.2, 0.1])
EXPLORERS = {
    "weights": (WEIGHTS, 3),
    "weights, a bound that one arm breaks": (weights_explorer([[1.0, 0.0], [-1.0, 3.0]], regret_max=0.2), 0),
    "weights, each request explores": (weights_explorer([[1.0, 0.0], [0.0, 1.0]], share=1.0), 0),
    "order": (order_explorer(), 0),
    "order, fewer answered than drawn": (order_explorer(best=5), 2),
    "order, a bound that leaves 3 of 6": (order_explorer(best=6, regret_max=0.08), 0),
    "order, without a floor": (order_explorer(best=3, floor=0.0, share=1.0), 0),
}
PARTIES = np.random.default_rng(2).random((6, 2)) + 0.2


def million(explorer, parties, top_k):
    """Return int64[DRAWS, K]: the answers to IDS, by the hash functions over arrays."""
    utilities = weighted_sum(parties, TUNED)
    tuned = select(utilities, top_k)
    hashes = mixed_all(IDS ^ np.uint64(mixed(SEED)))
    explores = hashes < np.uint64(min(int(explorer.share * 2.0**64), (1 << 64) - 1))
    draws = mixed_all(hashes)
    orders = np.tile(tuned, (DRAWS, 1))
    if isinstance(explorer, WeightsExplorer):
        ends = (np.cumsum(explorer.probabilities)[:-1] * 2.0**64).astype(np.uint64)
        arms = np.searchsorted(ends, draws, side="right")
        for arm, weights in enumerate(explorer.weights):
            decided = select(weighted_sum(parties, weights), top_k)
            if value(tuned, utilities) - value(decided, utilities) <= bound(parties, top_k, explorer.regret_max):
                orders[explores & (arms == arm)] = decided
        return orders
    drawn = int(asked(explorer, parties, exploring(explorer, 1)[0], top_k).arm.removeprefix("best-"))
    first = select(utilities)[:drawn]
    pins = (first.astype(np.uint64) + np.uint64(1)) * np.uint64(977)
    noise = mixed_all(pins ^ mixed_all(draws)[:, None]) >> np.uint64(11)
    gumbel = -np.log(-np.log((noise.astype(float) + 0.5) * 2.0**-53))
    evenly = draws < np.uint64(int(explorer.floor * 2.0**64))
    keys = gumbel + np.where(evenly[:, None], 0, utilities[first].astype(float) / explorer.temperature)
    answered = min(drawn, len(tuned))
    order = first[np.argsort(-keys, axis=1, kind="stable")][:, :answered]
    orders[:, :answered] = np.where(explores[:, None], order, tuned[:answered])
    return orders


def logged(explorer, orders):
    """Return the rows of the log for these answers."""
    random = np.random.default_rng(9).random((2, len(PARTIES), 3), np.float32)
    scores = [ToyScores(order, random[0, :, 0], random[1], PARTIES) for order in orders]
    answers = [
        answered_request(number, len(PARTIES), scores=one, exploring=Exploring("e" * 64, SEED, None, explorer))
        for number, one in enumerate(scores, 1)
    ]
    return impressions_batch(answers).to_pylist()


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_million_draws_are_as_frequent_as_the_logged_propensities_say(name):
    explorer, top_k = EXPLORERS[name]
    orders = million(explorer, PARTIES, top_k)
    for number in range(300):  # the arrays answer as the server does
        np.testing.assert_array_equal(
            orders[number], order_of(asked(explorer, PARTIES, int(IDS[number]), top_k), PARTIES, top_k)
        )
    distinct, counts = np.unique(orders, axis=0, return_counts=True)
    found = logged(explorer, distinct)
    chances = np.array([row["order_propensity"] for row in found])
    assert chances.sum() == pytest.approx(1)
    assert len(chances) > 1
    assert stats.chisquare(counts, chances * DRAWS).pvalue > 1e-3
    for position in range(orders.shape[1]):
        at = {row["places"][position]: row["propensities"][position] for row in found}
        seen = np.array([np.count_nonzero(orders[:, position] == row) for row in at])
        assert sum(at.values()) == pytest.approx(1)
        if len(at) > 1:
            assert stats.chisquare(seen, np.array(list(at.values())) * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0125, 0.3, 1.0])
def test_the_share_of_the_requests_explores(share):
    explores = order_explorer(share=share).explores
    count = sum(explores(int(number)) for number in IDS[:100_000])
    assert stats.binomtest(count, 100_000, share).pvalue > 1e-3


def test_ids_in_a_row_explore_as_random_ones_do():
    explores = order_explorer(share=0.0125).explores
    count = sum(explores(number) for number in range(1, 100_001))
    assert stats.binomtest(count, 100_000, 0.0125).pvalue > 1e-3


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_same_seed_and_id_give_the_same_answer(name):
    explorer, top_k = EXPLORERS[name]
    for number in exploring(explorer, 50):
        one, other = (asked(explorer, PARTIES, number, top_k) for _ in range(2))
        assert type(one) is type(other)
        if isinstance(one, Explored):
            assert one.arm == other.arm
            np.testing.assert_array_equal(one.order, other.order)


def test_another_seed_gives_other_answers():
    one, other = (OrderExplorer(seed, 1.0, 1.0, TUNED, best=6, temperature=5.0, floor=0.0) for seed in (SEED, SEED + 1))
    same = [np.array_equal(asked(one, PARTIES, i).order, asked(other, PARTIES, i).order) for i in range(1, 200)]
    assert np.mean(same) < 0.1


tables = st.integers(0, 2**32).map(np.random.default_rng)
KINDS = st.sampled_from(["weights", "order"])


def drawn_case(kind, rng):
    """Draw an explorer, party utilities with ties and rows that are not finite, and a top_k."""
    rows = int(rng.integers(1, 9))
    parties = np.round(rng.normal(size=(rows, 2)), 1)
    parties[rng.random(rows) < 0.15, int(rng.integers(2))] = rng.choice([np.nan, np.inf, -np.inf, 1e300])
    share, regret_max = float(rng.choice([0.01, 0.5, 1.0])), float(rng.choice([0.01, 0.1, 0.5, 1.0]))
    if kind == "weights":
        arms = np.round(rng.normal(size=(int(rng.integers(1, 5)), 2)) + TUNED, 1)
        arms[0] = TUNED
        explorer = weights_explorer(arms, share, regret_max)
    else:
        temperature, floor = float(rng.choice([0.01, 0.5, 10.0])), float(rng.choice([0, 0.3]))
        explorer = order_explorer(int(rng.integers(2, 7)), share, regret_max, temperature, floor)
    return explorer, parties, int(rng.integers(0, rows + 3))


@settings(max_examples=150, deadline=None)
@given(kind=KINDS, rng=tables)
def test_propensities_are_those_of_the_enumerated_policy_and_sum_to_1(kind, rng):
    explorer, parties, top_k = drawn_case(kind, rng)
    expected = enumerated(explorer, parties, top_k)
    assert math.fsum(expected.values()) == pytest.approx(1)
    total, count = 0.0, min(top_k, len(parties)) or len(parties)
    marginals = np.zeros((count, len(parties)))
    for order, probability in expected.items():
        for position, row in enumerate(order):
            marginals[position, row] += probability
    for order, probability in expected.items():
        found = explorer.propensities(parties, np.array(order))
        assert found.order == pytest.approx(probability, rel=1e-9, abs=1e-15)
        np.testing.assert_allclose(found.positions, marginals[range(count), list(order)], rtol=1e-9, atol=1e-15)
        assert (found.positions <= 1).all()
        total += found.order
    assert total == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, rng=tables)
def test_an_order_that_the_policy_never_gives_has_no_propensity(kind, rng):
    explorer, parties, _ = drawn_case(kind, rng)
    expected = enumerated(explorer, parties, 2)
    for order in itertools.permutations(range(len(parties)), min(2, len(parties))):
        if order not in expected:
            assert explorer.propensities(parties, np.array(order)).order == 0


@settings(max_examples=200, deadline=None)
@given(kind=KINDS, rng=tables, request_id=st.integers(1, (1 << 64) - 1))
def test_no_request_gives_up_more_than_regret_max(kind, rng, request_id):
    explorer, parties, top_k = drawn_case(kind, rng)
    utilities = weighted_sum(parties, TUNED)
    tuned = select(utilities, top_k)
    decision = asked(explorer, parties, request_id, top_k)
    assert isinstance(decision, Tuned) != explorer.explores(request_id)
    if isinstance(decision, Explored):
        limit = bound(parties, top_k, explorer.regret_max)
        regret = value(tuned, utilities) - value(decision.order, utilities)
        assert regret <= limit + 1e-9 * (1 + abs(limit))
        assert decision.regret == pytest.approx(regret, abs=1e-9 * (1 + abs(decision.tuned_value)))
        assert decision.tuned_value == pytest.approx(value(tuned, utilities), rel=1e-9, abs=1e-12)
        assert sorted(set(decision.order.tolist())) == sorted(decision.order.tolist())
        assert explorer.propensities(parties, decision.order).order > 0
        assert (explorer.propensities(parties, decision.order).positions > 0).all()


@settings(max_examples=200, deadline=None)
@given(kind=KINDS, rng=tables, request_id=st.integers(1, (1 << 64) - 1))
def test_a_logged_answer_replays_to_the_bit(kind, rng, request_id):
    explorer, parties, top_k = drawn_case(kind, rng)
    pins = rng.permutation(np.arange(1, len(parties) + 1, dtype=np.uint64))
    decision = asked(explorer, parties, request_id, top_k, pins)
    utilities = weighted_sum(parties, TUNED)
    order, arm, weights = select(utilities, top_k), None, TUNED
    if isinstance(decision, Explored):
        order, arm, utilities, weights = decision.order, decision.arm, decision.utilities, decision.party_weights
    np.testing.assert_array_equal(weighted_sum(parties[order], weights), utilities[order])
    places = order.astype(np.uint32)
    shuffled = rng.permutation(len(order))  # the log's order must not be what the replay gives back
    logged = order[shuffled]
    again = explorer.replay(request_id, arm, pins[logged], places[shuffled], utilities[logged])
    np.testing.assert_array_equal(logged[again], order)


def test_the_regret_of_an_order_has_the_same_bits_alone_and_among_others():
    """What was answered and what its propensity counts must not differ in whether an arm is within the bound."""
    rng = np.random.default_rng(8)
    for answered in (1, 7, 8, 9, 25, 128, 1000):
        tuned = TunedOrder(rng.normal(size=1000).astype(np.float32), answered, 0.1)
        orders = np.array([rng.permutation(1000)[:answered] for _ in range(9)])
        assert tuned.regrets(orders).tolist() == [float(tuned.regrets(order)) for order in orders]


def test_utilities_beyond_what_the_temperature_tells_apart_are_drawn_as_tuned():
    utilities = np.array([[3e38, 0.0], [1.0, 0.0], [-3e38, 0.0]])
    explorer = order_explorer(temperature=1e-9, share=1.0, floor=0.0)
    assert asked(explorer, utilities, 5).order.tolist() == [0, 1, 2]
    assert explorer.propensities(utilities, np.arange(3)).order == pytest.approx(1)


def test_an_arm_equal_to_the_tuned_weights_answers_as_tuned_and_its_probability_counts():
    explorer = weights_explorer([TUNED, [0.0, 1.0]])
    tuned = select(weighted_sum(PARTIES, TUNED))
    found = [asked(explorer, PARTIES, number) for number in exploring(explorer)]
    assert {one.arm for one in found} == {"arm0", "arm1"}
    for one in found:
        if one.arm == "arm0":
            np.testing.assert_array_equal(one.order, tuned)
            assert one.regret == 0
    assert explorer.propensities(PARTIES, tuned).order == pytest.approx(0.75)


def test_an_arm_beyond_the_bound_is_withheld_by_name():
    explorer = weights_explorer([[-1.0, -1.0]], share=1.0, regret_max=0.01)
    assert asked(explorer, PARTIES, 1) == Withheld("arm0")
    assert explorer.propensities(PARTIES, select(weighted_sum(PARTIES, TUNED))).order == pytest.approx(1)
    assert asked(order_explorer(share=1.0, regret_max=1e-9), PARTIES, 1) == Withheld("best-4")


@pytest.mark.parametrize("explorer", [WEIGHTS, order_explorer(share=1.0)], ids=["weights", "order"])
def test_one_candidate_has_one_order(explorer):
    parties = PARTIES[:1]
    for number in exploring(explorer, 20):
        assert order_of(asked(explorer, parties, number), parties, 0).tolist() == [0]
    found = explorer.propensities(parties, np.array([0]))
    assert (found.order, found.positions.tolist()) == (pytest.approx(1), [pytest.approx(1)])


@pytest.mark.parametrize("explorer", [WEIGHTS, order_explorer(share=1.0, best=8)], ids=["weights", "order"])
def test_rows_that_are_not_finite_stay_at_the_end_in_the_callers_order(explorer):
    parties = PARTIES.copy()
    parties[[4, 1]] = np.nan
    for number in exploring(explorer, 50):
        order = order_of(asked(explorer, parties, number), parties, 0)
        assert order[-2:].tolist() == [1, 4]
        assert explorer.propensities(parties, order).positions[-2:] == pytest.approx([1, 1])
    nothing = np.full((3, 2), np.nan)
    for number in exploring(explorer, 50):
        assert order_of(asked(explorer, nothing, number), nothing, 0).tolist() == [0, 1, 2]
    assert explorer.propensities(nothing, np.arange(3)).order == pytest.approx(1)


def test_equal_utilities_keep_the_callers_order_in_a_replay_too():
    places, utilities = np.array([9, 2, 5], np.uint32), np.array([0.5, 0.5, np.nan], np.float32)
    assert replay_by_utility(places, utilities).tolist() == [1, 0, 2]


@settings(max_examples=100, deadline=None)
@given(rng=tables, items=st.integers(2, 7), spread=st.sampled_from([0.1, 3.0, 40.0, 1e4]))
def test_plackett_luce_equals_the_enumeration_also_for_weights_beyond_float64(rng, items, spread):
    log_weights = np.sort(rng.random(items) * spread)[::-1]
    weights = np.exp((log_weights - log_weights[0]).astype(np.longdouble))  # 80 bits hold exp(-10,000)
    marginals = np.zeros((items, items))
    for order in itertools.permutations(range(items)):
        probability, left = 1.0, dict(enumerate(weights))
        for item in order:
            probability *= left[item] / sum(left.values())
            del left[item]
        marginals[range(items), order] += probability
        assert order_probability(log_weights, order) == pytest.approx(float(probability), rel=1e-9, abs=1e-20)
    np.testing.assert_allclose(position_probabilities(log_weights, items), marginals, rtol=1e-9, atol=1e-20)


def test_numbers_and_arrays_hash_alike():
    numbers = [0, 1, 2**63, 2**64 - 1, *(int(number) for number in IDS[:100])]
    assert mixed_all(np.array(numbers, np.uint64)).tolist() == [mixed(number) for number in numbers]


def test_the_hash_is_the_published_one():
    """The first numbers of SplitMix64 with the seed 1234567 (the reference of java.util.SplittableRandom)."""
    gamma = 0x9E3779B97F4A7C15
    assert [mixed((1234567 + i * gamma) % 2**64) for i in range(3)] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip
