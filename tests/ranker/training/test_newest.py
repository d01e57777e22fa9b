"""What a network learns last: every other of the newest requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ranker.errors import DatasetError
from ranker.evaluation.metrics import auc
from ranker.network.model import RankerNetwork
from ranker.training.examples import Examples, newest_and_held
from ranker.training.fit import learn_newest, predict, train
from ranker.training.progress import Continued, Epoch, Step
from ranker.training.settings import Execution
from tests.ranker.toy_training import CONFIG, HEADS, SIZES, examples, learn


class Recorder:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.epochs: list[Epoch] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)


def turned(found: Examples) -> Examples:
    """Return the same requests in a time when users want the opposite."""
    return replace(found, labels=1 - found.labels)


def test_every_other_request_is_learned_from_and_none_of_the_rest() -> None:
    whole = examples(3, 11)
    newest, held = newest_and_held(whole)
    assert (newest.batch.requests, held.batch.requests) == (6, 5)
    for part, places in ((newest, range(0, 11, 2)), (held, range(1, 11, 2))):
        rows = np.isin(whole.batch.row_request(), list(places))
        assert np.array_equal(part.labels, whole.labels[rows])
        assert np.array_equal(part.batch.candidate["pin_embedding"], whole.batch.candidate["pin_embedding"][rows])


def test_one_request_cannot_both_teach_and_calibrate() -> None:
    with pytest.raises(DatasetError, match="only one request.*pass --newest-epochs 0"):
        newest_and_held(examples(3, 1))


def test_what_has_changed_since_the_other_requests_is_learned() -> None:
    before, execution = torch.get_num_threads(), Execution(threads=1)
    try:
        network, _ = train(SIZES, HEADS, examples(1, 300), examples(2, 50), replace(CONFIG, epochs=4), execution)
        newest, held = newest_and_held(turned(examples(4, 600)))
        others = {name: value.clone() for name, value in network.state_dict().items()}
        assert auc(predict(network, held)[:, 0], held.labels[:, 0]) < 0.3
        config = replace(CONFIG, newest_epochs=12, learning_rate=0.04)
        learned = learn_newest(network, HEADS, newest, held, config, execution)
    finally:
        torch.set_num_threads(before)
    assert auc(predict(learned, held)[:, 0], held.labels[:, 0]) > 0.7
    assert all(torch.equal(value, others[name]) for name, value in network.state_dict().items())
    # Inputs keep their scale: what the network knows about them must stay true.
    assert torch.equal(learned.pin_mean, network.pin_mean)


def test_it_takes_a_quarter_of_the_rate_and_its_own_number_of_epochs() -> None:
    recorder, config = Recorder(), replace(CONFIG, newest_epochs=1)
    newest, held = newest_and_held(examples(4, 40))
    network = RankerNetwork(learn(Execution(threads=1), replace(CONFIG, epochs=1))[0].config)
    before = torch.get_num_threads()
    try:
        learn_newest(network, HEADS, newest, held, config, Execution(threads=1, watchers=(recorder,)))
    finally:
        torch.set_num_threads(before)
    assert [epoch.number for epoch in recorder.epochs] == [1]
    assert max(step.learning_rate for step in recorder.steps) <= CONFIG.learning_rate / 4


def test_the_steps_and_epochs_of_a_tracker_go_on() -> None:
    recorder = Recorder()
    continued = Continued(recorder, steps=30, epochs=3)
    continued.step(Step(1, 2, 8, 0.5, 1e-3, 10.0))
    continued.epoch(Epoch(2, 0.5, 0.4, {"save": 0.4}))
    assert recorder.steps == [Step(4, 32, 38, 0.5, 1e-3, 10.0)]
    assert recorder.epochs == [Epoch(5, 0.5, 0.4, {"save": 0.4})]
