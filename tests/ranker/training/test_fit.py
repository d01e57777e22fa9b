"""What a training keeps to: the same weights after a stop and on any number of ranks, and why it cannot go on."""

from __future__ import annotations

import multiprocessing.context
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.engine import ROW_REQUEST, FeatureBatch
from model_store.model.similarities import similarities_of_batch
from ranker.errors import CheckpointError, DivergedError, SettingError
from ranker.network.model import RankerNetwork
from ranker.training.checkpoint import FILE, CheckpointPlan
from ranker.training.examples import Examples, utilities_of
from ranker.training.fit import predict, train
from ranker.training.losses import calibrated_logits, head_losses, order_quality
from ranker.training.minibatches import Minibatches
from ranker.training.progress import Epoch, Step
from ranker.training.ranks import ALONE
from ranker.training.settings import Execution, TrainingConfig, precision_of
from tests.ranker.toy_training import CONFIG, HEADS, SIZES, UTILITY, examples, learn, main

ONE_THREAD = Execution(threads=1)


@pytest.fixture(autouse=True, scope="module")
def threads_are_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[RankerNetwork, list[Epoch]]:
    return learn(ONE_THREAD)


class StoppedError(Exception):
    """The training was ended from within."""


class Recorder:
    """Keeps what it is told; ends the training after so many batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps: list[Step] = []
        self.epochs: list[Epoch] = []
        self._stop_after = stop_after

    def step(self, step: Step) -> None:
        self.steps.append(step)
        if step.done == self._stop_after:
            raise StoppedError

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)


def same_bits(ours: RankerNetwork, theirs: RankerNetwork) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Makes processes that have PyTorch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranker.toy_training"])
    return context


def test_progress_tells_epoch_loss_learning_rate_and_speed(uninterrupted: tuple[RankerNetwork, list[Epoch]]) -> None:
    recorder = Recorder()
    network, epochs = learn(replace(ONE_THREAD, watchers=(recorder,)))
    assert same_bits(network, uninterrupted[0])
    assert [(s.epoch, s.done, s.total) for s in recorder.steps] == [
        (e, 3 * e - 3 + b, 6) for e in (1, 2) for b in (1, 2, 3)
    ]
    assert recorder.epochs == epochs
    assert recorder.steps[2].loss == epochs[0].train_loss
    assert all(step.rows_per_s > 0 and 0 < step.learning_rate <= CONFIG.learning_rate for step in recorder.steps)
    assert list(epochs[0].validation_losses) == list(HEADS)
    assert epochs[0].validation_loss == pytest.approx(np.mean(list(epochs[0].validation_losses.values())))


# One checkpoint after two batches and one after the epoch's third: the process dies at a batch, or while it writes the
# first checkpoint's bytes (1), makes its name durable (2), or writes the second (3).
@pytest.mark.parametrize(
    ("mode", "count", "next_batch"),
    [("batch", 1, 1), ("batch", 5, 4), ("batch", 6, 6), ("fsync", 1, 1), ("fsync", 2, 3), ("fsync", 3, 3)],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    mode: str,
    count: int,
    next_batch: int,
    tmp_path: Path,
    processes: multiprocessing.context.ForkServerContext,
    uninterrupted: tuple[RankerNetwork, list[Epoch]],
) -> None:
    killed = processes.Process(target=main, args=(mode, str(tmp_path), count))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    recorder = Recorder()
    network, epochs = learn(
        Execution(checkpoints=CheckpointPlan(tmp_path, resume=True), watchers=(recorder,), threads=1)
    )
    assert same_bits(network, uninterrupted[0])
    assert epochs == uninterrupted[1]
    assert recorder.steps[0].done == next_batch


@pytest.mark.parametrize("stop_after", range(1, 7))
def test_a_training_stopped_after_any_batch_goes_on_to_the_same_bits(
    stop_after: int, tmp_path: Path, uninterrupted: tuple[RankerNetwork, list[Epoch]]
) -> None:
    plan = CheckpointPlan(tmp_path, every_batches=1)
    with pytest.raises(StoppedError):
        learn(Execution(checkpoints=plan, watchers=(Recorder(stop_after),), threads=1))
    network, epochs = learn(Execution(checkpoints=replace(plan, resume=True), threads=1))
    assert same_bits(network, uninterrupted[0])
    assert epochs == uninterrupted[1]


def test_a_finished_training_resumes_to_its_result_without_a_step(
    tmp_path: Path, uninterrupted: tuple[RankerNetwork, list[Epoch]]
) -> None:
    plan = CheckpointPlan(tmp_path, resume=True)
    learn(Execution(checkpoints=plan, threads=1))
    recorder = Recorder()
    network, epochs = learn(Execution(checkpoints=plan, watchers=(recorder,), threads=1))
    assert recorder.steps == []
    assert same_bits(network, uninterrupted[0])
    assert epochs == uninterrupted[1]


def test_a_checkpoint_is_renewed_when_its_time_has_come(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        learn(Execution(checkpoints=CheckpointPlan(tmp_path, every_s=0), watchers=(Recorder(2),), threads=1))
    recorder = Recorder()
    learn(Execution(checkpoints=CheckpointPlan(tmp_path, resume=True), watchers=(recorder,), threads=1))
    assert recorder.steps[0].done == 2  # the second batch was told before it was saved


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    plan = CheckpointPlan(tmp_path)
    once = replace(CONFIG, epochs=1)
    learn(Execution(checkpoints=plan, threads=1), once)
    with pytest.raises(CheckpointError, match=r"already exists; use --resume .* to continue from it"):
        learn(Execution(checkpoints=plan, threads=1), once)
    resumed = Execution(checkpoints=replace(plan, resume=True), threads=1)
    with pytest.raises(CheckpointError, match=r"another run: learning_rate was 0.005 and is now 0.1\. Resume with"):
        learn(resumed, replace(once, learning_rate=0.1))
    with pytest.raises(CheckpointError, match=r"another run: dropout was 0.1 and is now 0.5\."):
        learn(resumed, once, dropout=0.5)
    with pytest.raises(CheckpointError, match=r"another run: the utility table was [0-9a-f]{64} and is now none\."):
        learn(resumed, once, utility=None)


def aged(before: Examples) -> Examples:
    before.ages_s[0, 0] += 1
    return before


def of_other_creators(before: Examples) -> Examples:
    return replace(before, attributes={"creator_tail": 1 - before.attributes["creator_tail"]})


def shown_otherwise(before: Examples) -> Examples:
    rows = before.batch.rows
    return replace(before, positions=np.zeros(rows, np.int64), propensities=np.full(rows, 0.5))


@pytest.mark.parametrize("change", [aged, shown_otherwise, of_other_creators])
def test_a_checkpoint_of_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Examples], Examples]
) -> None:
    resumed = Execution(checkpoints=CheckpointPlan(tmp_path, resume=True), threads=1)
    learn(resumed, replace(CONFIG, epochs=1))
    changed = change(examples(1))
    monkeypatch.setattr(
        "tests.ranker.toy_training.examples", lambda seed, *_: changed if seed == 1 else examples(2, 11)
    )
    with pytest.raises(CheckpointError, match=r"another run: the training data was \w{16} and is now \w{16}\."):
        learn(resumed, replace(CONFIG, epochs=1))


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"no archive"]
)
def test_a_damaged_checkpoint_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    resumed = Execution(checkpoints=CheckpointPlan(tmp_path, resume=True), threads=1)
    learn(resumed, replace(CONFIG, epochs=1))
    path = tmp_path / FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="cannot be read; delete it to start again"):
        learn(resumed, replace(CONFIG, epochs=1))


def test_a_checkpoint_executes_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": 1, "run": Trap()}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        learn(Execution(checkpoints=CheckpointPlan(tmp_path, resume=True), threads=1))
    assert not (tmp_path / "sprung").exists()


def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        "-m", "tests.ranker.toy_training", "rank", str(tmp_path), "0",
    ]  # fmt: skip
    strict = {**os.environ, "PYTHONWARNINGS": "error::FutureWarning"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=strict)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]) for name in ranks[0]["weights"])
    assert ranks[0]["losses"] == ranks[1]["losses"]
    # Without dropout the time windows are all the chance there is, and those are drawn for all ranks together.
    alone, epochs = learn(ONE_THREAD, dropout=0.0)
    losses = [found[:2] for found in ranks[0]["losses"]]
    np.testing.assert_allclose(losses, [(e.train_loss, e.validation_loss) for e in epochs], rtol=1e-4)
    for name, weights in alone.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], weights, rtol=1e-2, atol=1e-3, msg=name)


def calibrated(network: RankerNetwork, validation: Examples) -> np.ndarray:
    return calibrated_logits(predict(network, validation), validation.labels)


def loss_of(network: RankerNetwork, validation: Examples) -> float:
    logits = calibrated(network, validation)
    return float(head_losses(logits, validation.labels, validation.batch.row_request()).mean())


def test_training_stops_after_its_patience_and_keeps_the_best_weights() -> None:
    hasty = replace(CONFIG, epochs=40, patience=1, learning_rate=0.01)
    network, epochs = learn(ONE_THREAD, hasty, utility=None)
    losses = [epoch.validation_loss for epoch in epochs]
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 3 < 37
    assert loss_of(network, examples(2, 11)) == pytest.approx(losses[best], rel=1e-5)


def test_the_utility_orders_by_calibrated_probabilities() -> None:
    network, (epoch,) = learn(ONE_THREAD, replace(CONFIG, epochs=1))
    validation = examples(2, 11)
    probabilities = 1 / (1 + np.exp(-calibrated(network, validation)))
    happened, predicted = (
        utilities_of(UTILITY, validation, values.astype(np.float32)) for values in (validation.labels, probabilities)
    )
    assert epoch.utility_order == pytest.approx(order_quality(predicted, happened, validation.batch.row_splits))


@pytest.mark.parametrize(
    ("orders", "best", "patience"),
    [
        ((0.5, 0.9, 0.1, 0.1), 1, 9),
        ((0.9, 0.1, 0.1, 0.1), 0, 9),
        ((None, None, None, None), 3, 9),
        ((0.9, 0.1, 0.1), 0, 1),
    ],
    ids=["second", "first", "heads alone", "out of patience"],
)
def test_the_epoch_is_kept_whose_utility_orders_well(
    orders: tuple[float | None, ...], best: int, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, validation = iter(orders), examples(2, 50)
    monkeypatch.setattr("ranker.training.fit.order_quality", lambda *_: next(judged))
    config = replace(CONFIG, epochs=4, patience=patience)
    network, epochs = train(SIZES, HEADS, examples(1, 300), validation, config, ONE_THREAD, utility=UTILITY)
    losses = [epoch.validation_loss for epoch in epochs]
    assert sorted(losses, reverse=True) == losses  # the heads alone would keep the last
    assert [epoch.utility_order for epoch in epochs] == list(orders)
    assert loss_of(network, validation) == pytest.approx(losses[best], rel=1e-6)


def test_ten_steps_can_be_learned() -> None:
    _, epochs = learn(ONE_THREAD, replace(CONFIG, requests_per_batch=7))  # 33 requests, two epochs
    assert len(epochs) == 2


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    with pytest.raises(DivergedError, match=r"the loss is nan at epoch \d, batch \d; lower --learning-rate"):
        learn(ONE_THREAD, replace(CONFIG, learning_rate=1e30, epochs=3))


def test_a_head_that_weighs_nothing_teaches_nothing_and_does_not_count() -> None:
    config = replace(CONFIG, weight_decay=0.0, head_weights={"hide": 0.0})
    network, epochs = learn(ONE_THREAD, config)
    untrained, _ = learn(ONE_THREAD, replace(config, learning_rate=1e-30))

    def biases(network: RankerNetwork) -> list[float]:
        last = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m.out_features == len(HEADS)][-1]
        return list(last.bias.tolist())

    assert biases(network)[0] != biases(untrained)[0]
    assert biases(network)[1] == biases(untrained)[1]
    assert epochs[0].validation_loss == pytest.approx(epochs[0].validation_losses["save"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"click": 2.0}, "cannot weigh the unknown head 'click'; the heads of this data are save, hide"),
        ({"save": -1.0}, "the weight of head 'save' must be a finite number of at least 0, but is -1"),
        ({"save": float("nan")}, "must be a finite number of at least 0, but is nan"),
        ({"save": 0.0, "hide": 0.0}, "every head has weight 0"),
    ],
)
def test_head_weights_that_cannot_be_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TrainingConfig(head_weights=weights).weights_of(HEADS)


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(SettingError, match="learning_rate must not be 0"):
        TrainingConfig(learning_rate=0)
    with pytest.raises(SettingError, match=r"time_window_share must not be 1\.5"):
        TrainingConfig(time_window_share=1.5)
    with pytest.raises(SettingError, match="unknown precision 'fp8'; choose one of auto, fp32, bf16"):
        precision_of("fp8")


def test_bfloat16_learns_nearly_the_same_and_keeps_float32_weights(
    uninterrupted: tuple[RankerNetwork, list[Epoch]],
) -> None:
    network, epochs = learn(ONE_THREAD, replace(CONFIG, precision="bf16"))
    assert not same_bits(network, uninterrupted[0])
    assert all(weights.dtype == torch.float32 for weights in network.parameters())
    assert epochs[-1].validation_loss == pytest.approx(uninterrupted[1][-1].validation_loss, rel=0.02)


def test_the_time_window_changes_training_unless_it_is_switched_off(
    uninterrupted: tuple[RankerNetwork, list[Epoch]],
) -> None:
    off, _ = learn(ONE_THREAD, replace(CONFIG, time_window_h_max=0.0))
    none_masked, _ = learn(ONE_THREAD, replace(CONFIG, time_window_share=0.0))
    assert same_bits(off, none_masked)
    assert not same_bits(off, uninterrupted[0])


def test_hidden_actions_are_not_compared_with_candidates() -> None:
    found = examples(3)
    actions = int(found.batch.request["sequence_actions"].max())
    candidate = {**found.batch.candidate, "similarities": similarities_of_batch(found.batch, actions)}
    found = replace(found, batch=FeatureBatch(found.batch.request, candidate, found.batch.row_splits))
    minibatches = Minibatches(found, len(found.users), 1, ALONE, window_h_max=24.0)
    (whole,) = minibatches.epoch(0, 0)
    (part,) = whole.parts
    inputs = {name: tensor.numpy() for name, tensor in part.inputs.items()}
    request = {name: inputs[name] for name in found.batch.request}
    splits = np.concatenate([[0], np.cumsum(np.bincount(inputs[ROW_REQUEST]))]).astype(np.int32)
    batch = FeatureBatch(request, {"pin_embedding": inputs["pin_embedding"]}, splits)
    np.testing.assert_array_equal(inputs["similarities"], similarities_of_batch(batch, actions))
    order = np.random.default_rng([1, 0, 0]).permutation(len(found.users))
    assert not np.array_equal(inputs["similarities"], found.take(order).batch.candidate["similarities"])
