"""The public shapes are what they say."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.measurements.public import HstuLike

HISTORY, CANDIDATES = 5, 3


@pytest.fixture(scope="module")
def changes():
    """Return bool[T, T]: whether a change of one token (row) changes another one's output (column)."""
    torch.manual_seed(0)
    module = HstuLike(width=16, heads=2, layers=2).eval()
    tokens = torch.randn(1, HISTORY + CANDIDATES, 16)
    with torch.inference_mode():
        found = module(tokens, HISTORY)
        changed = []
        for place in range(HISTORY + CANDIDATES):
            other = tokens.clone()
            other[:, place] = torch.randn(16)  # a constant would be lost in the norm
            changed.append((module(other, HISTORY) - found).abs().amax(-1)[0] > 1e-6)
    return torch.stack(changed)


def test_an_action_sees_those_up_to_itself_and_no_candidate(changes):
    assert torch.equal(changes[:HISTORY, :HISTORY], torch.ones(HISTORY, HISTORY, dtype=torch.bool).triu())
    assert not changes[HISTORY:, :HISTORY].any()


def test_a_candidate_sees_every_action_and_of_the_candidates_itself_alone(changes):
    assert changes[:HISTORY, HISTORY:].all()
    assert torch.equal(changes[HISTORY:, HISTORY:], torch.eye(CANDIDATES, dtype=torch.bool))
