from __future__ import annotations

import numpy as np
import pytest
import torch

from ranker.embedding.users.network import NetworkSizes, UserNetwork, tensors
from ranker.embedding.users.sequences import TIME_NUMBERS, PinRows, Sequences, windows
from tests.ranker.embedding.users.users import log_of, pin_vectors, random_log


def network(timed: bool = True, length_max: int = 20) -> UserNetwork:
    torch.manual_seed(4)
    found = UserNetwork(
        NetworkSizes(pins=30, pin_dim=6, actions=4, timed=timed, dim=16, layers=3, heads=2, length_max=length_max)
    ).eval()
    with torch.no_grad():  # zeros in a new network, which would hide what the distance does
        for name, weight in found.named_parameters():
            if name.endswith("distance"):
                weight.normal_()
    return found


def inputs(length: int = 20, batch: int = 3, timed: bool = True):
    draw = torch.Generator().manual_seed(1)
    times = torch.randn(batch, length, TIME_NUMBERS, generator=draw) if timed else None
    rows = torch.randint(0, 31, (batch, length), generator=draw)
    return (
        rows,
        torch.randn(batch, length, 6, generator=draw),
        torch.randint(0, 4, (batch, length), generator=draw),
        times,
    )


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("place", [1, 7, 19])
def test_a_later_action_moves_no_earlier_output(place, timed):
    rows, vectors, actions, times = inputs(timed=timed)
    net = network(timed)
    with torch.inference_mode():
        before = net(rows, vectors, actions, times)
        rows[:, place], vectors[:, place], actions[:, place] = 3, 9.0, (actions[:, place] + 1) % 4
        if times is not None:
            times[:, place] = 9.0
        after = net(rows, vectors, actions, times)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.allclose(before[:, place:], after[:, place:], atol=1e-3)


def test_no_gradient_of_an_output_reaches_a_later_action():
    rows, vectors, actions, times = inputs()
    net = network().train()
    vectors.requires_grad_()
    times.requires_grad_()
    net(rows, vectors, actions, times)[:, 7].square()[..., ::2].sum().backward()
    for given in (vectors.grad, times.grad):
        assert not given[:, 8:].any()
        assert given[:, :8].any(dim=-1).all()


def test_the_times_of_an_action_say_nothing_of_later_ones():
    rng = np.random.default_rng(2)
    time_ms = 1_600_000_000_000 + np.sort(rng.integers(0, 10**10, 20))
    log = log_of(np.zeros(20, np.int64), rng.integers(0, 30, 20), time_ms)
    pins = PinRows.of(log.pin_ids, log.pin_ids, pin_vectors(log))

    def read(log):
        sequences = Sequences.of_log(log, pins.readable, 1 << 60, timed=True)
        return windows(sequences, pins, np.array([0]), np.array([20]), 20).times[0]

    moved = time_ms + np.where(np.arange(20) >= 12, 3_333_333, 0)
    before, after = read(log), read(log_of(np.zeros(20, np.int64), log.pin, moved))
    assert np.array_equal(before[:12], after[:12])
    assert (before[12:] != after[12:]).any(axis=1).all()


def test_the_order_counts_without_times_too():
    rows, vectors, actions, _ = inputs(timed=False)
    net, turned = network(timed=False), torch.tensor([*range(18, -1, -1), 19])
    with torch.inference_mode():
        one = net(rows, vectors, actions, None)[:, -1]
        other = net(rows[:, turned], vectors[:, turned], actions[:, turned], None)[:, -1]
    assert not torch.allclose(one, other, atol=1e-2)


def test_what_is_behind_the_newest_action_does_not_count():
    log = random_log(events=200)
    pins = PinRows.of(log.pin_ids, log.pin_ids, pin_vectors(log))
    sequences = Sequences.of_log(log, pins.readable, 1 << 60, timed=True)
    first, stop = np.array([0, 3]), np.array([6, 5])
    net = network()
    with torch.inference_mode():
        narrow = net(*tensors(windows(sequences, pins, first, stop, 6)))
        wide = net(*tensors(windows(sequences, pins, first, stop, 16)))
    assert torch.allclose(narrow[0, 5], wide[0, 5], atol=1e-5)
    assert torch.allclose(narrow[1, 1], wide[1, 1], atol=1e-5)
    assert torch.allclose(narrow.norm(dim=-1), torch.ones(2, 6))
