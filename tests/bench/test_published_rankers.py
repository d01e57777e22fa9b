"""The published rankers compute what their papers' formulas say, here written in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.engines.fusion_latency import DEFAULT
from bench.engines.lift import QUICK, Course, Subject, trained
from bench.harness import run
from bench.rankers.dcn_v2 import FullRankCross
from bench.rankers.din import ActivationUnit, Dice, Din
from bench.rankers.fitting import PUBLISHED
from bench.rankers.inputs import Shape
from bench.rankers.published_rankers import conclude, measure
from bench.rankers.rows import Rows
from bench.rankers.sasrec import CausalAttention, SasRec
from model_store.bundle.files import read_bundle
from ranker.data.actions import action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.training.examples import Sampling
from tests.ranker.interactions import write_atomic

SHAPE = Shape(heads=2, dim=8, user_scalars=3, pin_scalars=4, surfaces=2, actions=3, length=6, pins=20)
REQUESTS, ROWS = 3, 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


def inputs(lengths=(6, 3, 0)):
    """Return inputs of three requests with sequences of these lengths."""
    present = torch.arange(SHAPE.length) < torch.tensor(lengths).unsqueeze(1)
    return {
        "user_embedding": torch.randn(REQUESTS, SHAPE.dim),
        "user_scalars": torch.randn(REQUESTS, SHAPE.user_scalars),
        "surface": torch.tensor([0, 1, 0]),
        "query": torch.randn(REQUESTS, SHAPE.dim),
        "pin_embedding": torch.randn(REQUESTS * ROWS, SHAPE.dim),
        "pin_scalars": torch.randn(REQUESTS * ROWS, SHAPE.pin_scalars),
        "row_request": torch.arange(REQUESTS).repeat_interleave(ROWS),
        "sequence_actions": torch.randint(1, SHAPE.actions + 1, (REQUESTS, SHAPE.length)) * present,
        "sequence_embeddings": torch.randn(REQUESTS, SHAPE.length, SHAPE.dim) * present.unsqueeze(-1),
        "pin_number": torch.randint(0, SHAPE.pins + 1, (REQUESTS * ROWS,)),
        "sequence_numbers": torch.randint(0, SHAPE.pins + 1, (REQUESTS, SHAPE.length)) * present,
    }


def arrays(module):
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def test_the_cross_network_is_that_of_the_formula():
    cross = FullRankCross(5, layers=3)
    first = torch.randn(4, 5)
    known, expected = arrays(cross), first.double().numpy()
    crossed = expected
    for layer in range(3):
        crossed = expected * (crossed @ known[f"layers.{layer}.weight"].T + known[f"layers.{layer}.bias"]) + crossed
    np.testing.assert_allclose(cross(first).detach().numpy(), crossed, rtol=1e-5, atol=1e-5)


def test_the_activation_unit_is_a_layer_on_candidate_action_difference_and_product():
    unit = ActivationUnit(8, hidden=5)
    candidates, actions = torch.randn(4, 8), torch.randn(6, 8)
    known = arrays(unit)
    expected = np.empty((4, 6))
    for row, candidate in enumerate(candidates.double().numpy()):
        for place, action in enumerate(actions.double().numpy()):
            read = np.concatenate([candidate, action, candidate - action, candidate * action])
            hidden = known["hidden.weight"] @ read + known["hidden.bias"]
            hidden = np.where(hidden > 0, hidden, known["slope"] * hidden)
            expected[row, place] = (known["out.weight"] @ hidden + known["out.bias"])[0]
    np.testing.assert_allclose(unit(candidates, actions).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_dice_switches_at_the_mean_of_the_minibatch():
    dice = Dice(3)
    torch.nn.init.constant_(dice.slope, 0.2)
    values = torch.randn(50, 3) * 2 + 1
    found, given = dice(values).detach().numpy(), values.double().numpy()
    share = 1 / (1 + np.exp(-(given - given.mean(axis=0)) / np.sqrt(given.var(axis=0) + 1e-8)))
    np.testing.assert_allclose(found, share * given + (1 - share) * 0.2 * given, rtol=1e-4, atol=1e-5)


def test_the_interest_is_a_weighted_sum_without_softmax():
    network, given = Din(SHAPE, dim=8).eval(), inputs()
    candidates = network.pins(given["pin_embedding"], given["pin_number"])
    interest = network.interest(candidates, given)
    actions = network.actions(given)[1, :3]
    weights = network.activation(candidates[ROWS : 2 * ROWS], actions)
    torch.testing.assert_close(interest[ROWS : 2 * ROWS], weights @ actions)
    assert not interest[2 * ROWS :].any(), "a user without an action has no interest"


def test_attention_is_that_of_the_formula_and_causal():
    attention, states = CausalAttention(4), torch.randn(2, 5, 4)
    present = torch.tensor([[False, True, True, True, True], [True] * 5])
    found, known = attention(states, present).detach().numpy(), arrays(attention)
    for row in range(2):
        for place in np.flatnonzero(present[row].numpy()):
            seen = [other for other in range(place + 1) if present[row, other]]
            query, key, value = (
                states[row].double().numpy() @ known[f"{name}.weight"].T for name in ("query", "key", "value")
            )
            scores = np.exp(key[seen] @ query[place] / 2)
            np.testing.assert_allclose(found[row, place], scores / scores.sum() @ value[seen], rtol=1e-5, atol=1e-5)


def test_sasrec_is_causal():
    network, given = SasRec(SHAPE, dim=8).eval(), inputs()
    changed = {**given, "sequence_embeddings": given["sequence_embeddings"].clone()}
    changed["sequence_embeddings"][0, 2] += 1  # the third newest: place 3 of 6, oldest first
    before, after = network.states(given), network.states(changed)
    torch.testing.assert_close(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3:], after[0, 3:])


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_lies_past_the_end_of_a_sequence_changes_nothing(name):
    network, given = PUBLISHED[name](SHAPE).eval(), inputs()
    changed = {**given, "sequence_embeddings": given["sequence_embeddings"].clone()}
    changed["sequence_embeddings"][1, 3:] += 1
    changed["sequence_embeddings"][2] += 1
    torch.testing.assert_close(network(given), network(changed))
    assert torch.isfinite(network(given)).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_requests_do_not_know_each_other(name):
    network, given = PUBLISHED[name](SHAPE).eval(), inputs()
    rows = {"pin_embedding", "pin_scalars", "pin_number"}
    alone = {key: value[ROWS : 2 * ROWS] if key in rows else value[1:2] for key, value in given.items()}
    alone["row_request"] = torch.zeros(ROWS, dtype=torch.int64)
    torch.testing.assert_close(network(alone), network(given)[ROWS : 2 * ROWS])


def test_the_script_trains_and_judges_every_ranker_and_writes_its_table(tmp_path: Path) -> None:
    write_atomic(tmp_path / "toy", per_user=20)
    raw, concluded = run(
        "published_rankers",
        lambda: measure(
            quick=True, courses=(Course("toy", "toy", "save"),), data=tmp_path, recbole_python=tmp_path / "absent"
        ),
        conclude,
        tmp_path / "results",
    )
    toy = raw["datasets"]["toy"]
    assert set(toy["rankers"]) == {DEFAULT, *PUBLISHED}
    assert set(toy["over_percent"][DEFAULT]) >= set(PUBLISHED)
    assert len(concluded.claims) == len(PUBLISHED)
    table = (tmp_path / "results" / "published_rankers.md").read_text()
    assert "| DIN |" in table
    assert "RecBole was not installed" in table
    assert [path.name for path in tmp_path.iterdir() if path.name not in {"toy", "results"}] == []


def test_pins_have_a_number_each_if_they_were_learned_from(rows_of_toy) -> None:
    rows, log = rows_of_toy
    for part in (rows.learned, rows.held, rows.test):
        request, numbers = part.batch.request, part.batch.candidate["pin_number"]
        assert not request["sequence_numbers"][request["sequence_actions"] == 0].any()
        assert len({*zip(part.pins, numbers, strict=True)}) == len(np.unique(part.pins))
    learned = rows.learned.batch
    assert ((learned.request["sequence_numbers"] > 0) == (learned.request["sequence_actions"] > 0)).all()
    assert learned.candidate["pin_number"].min() > 0
    assert learned.candidate["pin_number"].max() <= rows.shape.pins <= len(log.pin_ids)


@pytest.fixture
def rows_of_toy(tmp_path):
    dataset = read_atomic(write_atomic(tmp_path / "toy", per_user=20))
    folders = trained(Course("toy", "toy", "save"), {DEFAULT: Subject(DEFAULT)}, dataset, QUICK, tmp_path)
    log, few = action_log(dataset), Sampling(requests_max=40)
    return Rows.of(read_bundle(folders[DEFAULT][7]), log, few, few, few, 7), log
