"""Training: seeded minibatches of whole requests, weighted cross-entropy per head, early stopping, checkpoints."""

from __future__ import annotations

import copy
import ctypes
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from kernels.engine import ROW_REQUEST
from model_store.model.utility import UtilityTable
from ranker.data.users.rows import INTEREST_IMPORTANCES, INTEREST_SIMILARITIES
from ranker.errors import DivergedError, SettingError
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    decode_checkpoint,
    describe_run,
    differences,
    digest_of,
)
from ranker.training.examples import Examples, utilities_of
from ranker.training.losses import best_epoch, calibrated_logits, head_losses, order_quality, row_losses
from ranker.training.minibatches import Minibatch, Minibatches, Part, in_order
from ranker.training.off_policy import OffPolicyWeights
from ranker.training.progress import Epoch, Step
from ranker.training.ranks import ALONE, threads_of_this_process
from ranker.training.settings import Execution, TrainingConfig

#: Of the learning rate, for the newest requests: the network is to be corrected, and not learned anew.
_NEWEST_RATE = 0.25

#: Constants from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def train(
    network_config: NetworkConfig,
    heads: Sequence[str],
    examples: Examples,
    validation: Examples,
    config: TrainingConfig,
    execution: Execution | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    utility: UtilityTable | None = None,
) -> tuple[RankerNetwork, list[Epoch]]:
    """Train a network. On one machine's CPU, equal arguments give equal weights, even after a kill and a resume.

    On CUDA gradients are summed in no fixed order, so the last bits of the weights differ from run to run.

    Args:
        network_config: sizes of the network.
        heads: names of the label columns.
        examples: training examples.
        validation: examples for early stopping.
        config: training settings.
        execution: how to run and to whom to report; every rank passes equal values for the other arguments.
        parameters: initial parameters by name, including the constants of standardisation; random if None.
        utility: also judge epochs by this table's order, for which `validation` keeps the table's attributes; None
            judges them by the heads alone.

    Returns:
        The network of the best epoch, on the CPU and in evaluation mode, and all epochs; equal on every rank.

    Raises:
        SettingError: a weight names an unknown head, or the ranks have different settings.
        CheckpointError: the checkpoint is damaged, or belongs to another run.
        DivergedError: the loss is no longer finite.
    """
    training = _Training(
        network_config, heads, examples, validation, config, execution or Execution(), parameters, utility
    )
    training.resume()
    while not training.finished():
        training.learn()
        training.judge()
        training.save()
    return training.result()


def learn_newest(
    network: RankerNetwork,
    heads: Sequence[str],
    newest: Examples,
    held: Examples,
    config: TrainingConfig,
    execution: Execution | None = None,
    utility: UtilityTable | None = None,
) -> RankerNetwork:
    """Continue to train a network on requests that are newer than those it has learned from.

    What users want changes, and with it how much a pin's earlier actions say. On every dataset measured, a thousand
    newer requests add more than as many of the same time as the others.

    Args:
        network: the network, on the CPU.
        heads: names of the label columns.
        newest: the requests to learn from.
        held: requests of the same time for early stopping.
        config: training settings, of which `newest_epochs` and a part of `learning_rate` apply.
        execution: how to run and to whom to report; without checkpoints, since this takes a fraction of a training.
        utility: as for `train`.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    settings = replace(config, epochs=config.newest_epochs, learning_rate=config.learning_rate * _NEWEST_RATE)
    parameters = network.state_dict()
    learned, _ = train(network.config, heads, newest, held, settings, execution, parameters, utility)
    return learned


def predict(network: RankerNetwork, examples: Examples) -> np.ndarray:
    """Return float32[N, H], the logits of all rows in their order, without dropout."""
    network.eval()
    device = next(network.parameters()).device
    with torch.inference_mode():
        parts = [network(**_on(device, part)).cpu().numpy() for part in in_order(examples, ALONE)]
    return np.concatenate(parts)


class _Training:
    """The state of one training. Everything that a checkpoint holds is equal on every rank."""

    def __init__(
        self,
        network_config: NetworkConfig,
        heads: Sequence[str],
        examples: Examples,
        validation: Examples,
        config: TrainingConfig,
        execution: Execution,
        parameters: Mapping[str, Tensor] | None = None,
        utility: UtilityTable | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        torch.set_num_threads(execution.threads or threads_of_this_process())
        _keep_freed_memory()
        self._config, self._execution, self._ranks = config, execution, execution.ranks
        self._heads, self._validation, self._utility = tuple(heads), validation, utility
        device = self._ranks.device
        self._network = RankerNetwork(network_config)
        if parameters is None:
            request, candidate = examples.batch.request, examples.batch.candidate
            of_user = [request[name] for name in ("user_scalars", "recency", INTEREST_IMPORTANCES) if name in request]
            compared = [candidate[name] for name in ("similarities", INTEREST_SIMILARITIES) if name in candidate]
            self._network.standardise(
                torch.from_numpy(np.concatenate(of_user, axis=1)),
                torch.from_numpy(candidate["pin_scalars"]),
                torch.from_numpy(np.concatenate(compared, axis=1)) if compared else None,
            )
        else:
            self._network.load_state_dict(dict(parameters))
        self._parallel = self._ranks.parallel(self._network.to(device))
        self._weights = torch.tensor(config.weights_of(heads), device=device)
        self._bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        clip = config.off_policy_clip
        self._off_policy = None if clip is None else OffPolicyWeights.of(examples, clip)
        self._minibatches = Minibatches(
            examples,
            config.requests_per_batch,
            config.seed,
            self._ranks,
            config.time_window_h_max,
            config.time_window_share,
            self._off_policy,
        )
        self._optimiser = torch.optim.AdamW(
            self._network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._total = len(self._minibatches) * config.epochs
        # A rise that ends with the first step makes OneCycleLR divide by zero.
        rise = 0.1 if self._total != 10 else 0.2
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, config.learning_rate, total_steps=self._total, pct_start=rise
        )
        self._epoch, self._batch, self._loss_sum, self._rows_done = 0, 0, 0.0, 0
        self._epochs: list[Epoch] = []
        self._best = copy.deepcopy(self._network.state_dict())
        self._run: dict[str, str] = {}
        self._folder: CheckpointFolder | None = None
        if execution.checkpoints is not None or self._ranks.world > 1:
            self._run = describe_run(
                network_config, config, heads=self._heads, examples=examples, validation=validation
            )
            self._run["the parent"] = digest_of(parameters or {})
            self._run["the utility table"] = utility.digest if utility else "none"
        if execution.checkpoints is not None and self._ranks.leads:
            self._folder = CheckpointFolder(execution.checkpoints)
        self._saved_s, self._saved_batches = time.monotonic(), 0

    def resume(self) -> None:
        """Resume from the checkpoint of rank 0, if there is one."""
        leaders_run = json.loads(self._ranks.told(json.dumps(self._run).encode()))
        if differing := differences(leaders_run, self._run):
            raise SettingError(
                f"rank {self._ranks.rank} has other settings than rank 0: {differing}; start all ranks with one command"
            )
        if self._execution.checkpoints is None:
            return
        # All ranks resume from the same bytes: another rank may see another folder, or a newer checkpoint.
        content = self._ranks.told((self._folder.open() or b"") if self._folder is not None else b"")
        if not content:
            return
        found = decode_checkpoint(content, self._run)
        self._epoch, self._batch = found.epoch, found.batch
        self._loss_sum, self._rows_done = found.loss_sum, found.rows_done
        self._network.load_state_dict(found.network)
        self._best = found.best
        self._optimiser.load_state_dict(found.optimiser)
        self._schedule.load_state_dict(found.schedule)
        self._epochs = [Epoch(**epoch) for epoch in found.epochs]

    def finished(self) -> bool:
        epochs = len(self._epochs)
        if epochs >= self._config.epochs:
            return True
        return epochs > 0 and epochs - 1 - best_epoch(self._epochs) > self._config.patience

    def learn(self) -> None:
        """Run the remaining steps of this epoch."""
        self._network.train()
        rows_before, started_s = self._rows_done, time.monotonic()
        for minibatch in self._minibatches.epoch(self._epoch, self._batch):
            loss = self._step(minibatch)
            self._batch += 1
            self._loss_sum += loss * minibatch.rows
            self._rows_done += minibatch.rows
            self._tell((self._rows_done - rows_before) / max(1e-9, time.monotonic() - started_s))
            self._save_if_due()

    def judge(self) -> None:
        """Judge the epoch by the validation examples, and keep its weights if they are the best so far."""
        losses, order = self._validated()
        weights = self._weights.cpu().double().numpy()
        validation_loss = float((losses * weights).sum() / weights.sum())
        if not math.isfinite(validation_loss):
            raise DivergedError(
                f"the validation loss of epoch {self._epoch + 1} is {validation_loss}; lower --learning-rate"
            )
        by_head = dict(zip(self._heads, losses.tolist(), strict=True))
        self._epochs.append(Epoch(self._epoch + 1, self._loss_sum / self._rows_done, validation_loss, by_head, order))
        if best_epoch(self._epochs) == len(self._epochs) - 1:
            self._best = copy.deepcopy(self._network.state_dict())
        self._epoch, self._batch, self._loss_sum, self._rows_done = self._epoch + 1, 0, 0.0, 0
        if self._ranks.leads:
            for watcher in self._execution.watchers:
                watcher.epoch(self._epochs[-1])

    def save(self) -> None:
        """Write a checkpoint if checkpoints are planned; rank 0 writes for all ranks."""
        if self._folder is None:
            return
        self._folder.write(
            Checkpoint(
                run=self._run,
                epoch=self._epoch,
                batch=self._batch,
                loss_sum=self._loss_sum,
                rows_done=self._rows_done,
                network=self._network.state_dict(),
                best=self._best,
                optimiser=self._optimiser.state_dict(),
                schedule=self._schedule.state_dict(),
                epochs=[asdict(epoch) for epoch in self._epochs],
            )
        )
        self._saved_s, self._saved_batches = time.monotonic(), 0

    def result(self) -> tuple[RankerNetwork, list[Epoch]]:
        self._network.load_state_dict(self._best)
        return self._network.to("cpu").eval(), self._epochs

    def _step(self, minibatch: Minibatch) -> float:
        """Learn from one minibatch; return its mean loss over all ranks."""
        device, ranks = self._ranks.device, self._ranks
        torch.manual_seed(self._minibatches.dropout_seed(self._epoch, self._batch))
        self._optimiser.zero_grad()
        total = torch.zeros((), device=device)
        for number, part in enumerate(minibatch.parts, start=1):
            last = number == len(minibatch.parts)
            with ranks.gradients_kept_apart(self._parallel, unless=last):
                with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                    logits = self._parallel(**_on(device, part))
                losses = _losses(logits, part, device)
                # The sum over this rank's rows is divided by the rows of all ranks, so ranks with fewer rows count
                # less. Averaging the gradients divides by the number of ranks once more.
                own = (losses.sum(dim=0) * self._weights).sum() / self._weights.sum() / minibatch.rows
                (own * ranks.world).backward()  # type: ignore[no-untyped-call]
            total += own.detach()
        loss = float(ranks.sum(total))
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at epoch {self._epoch + 1}, batch {self._batch + 1}; lower --learning-rate"
            )
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimiser.step()
        self._schedule.step()
        return loss

    def _validated(self) -> tuple[np.ndarray, float | None]:
        """Return float64[H], the loss of each head over all validation rows, and the quality of the utility's order.

        Every rank gets those of rank 0: processors may differ in the last bits, and all ranks must stop together.
        """
        logits = self._validation_logits()
        losses, order = np.full(len(self._heads), np.nan), None
        if np.isfinite(logits).all():
            examples, rows = self._validation, self._validation.batch.row_request().astype(np.int64)
            weights = None if self._off_policy is None else self._off_policy.of_rows(examples)
            calibrated = calibrated_logits(logits, examples.labels, weights)
            losses = head_losses(calibrated, examples.labels, rows, weights)
            if self._utility is not None:
                probabilities = (0.5 * np.tanh(0.5 * calibrated) + 0.5).astype(np.float32)
                order = order_quality(
                    utilities_of(self._utility, examples, probabilities),
                    utilities_of(self._utility, examples, examples.labels),
                    examples.batch.row_splits,
                )
        by_head, order = json.loads(self._ranks.told(json.dumps([losses.tolist(), order]).encode()))
        return np.array(by_head), order

    def _validation_logits(self) -> np.ndarray:
        """Return float32[N, H], the logits of all validation rows."""
        self._network.eval()
        device, rows = self._ranks.device, self._validation.batch.row_request()
        logits = torch.zeros(len(rows), len(self._heads), device=device)
        own = np.flatnonzero(np.isin(rows, self._ranks.share(np.arange(self._validation.batch.requests))))
        with torch.inference_mode():
            found = [self._network(**_on(device, part)).float() for part in in_order(self._validation, self._ranks)]
            if found:
                logits[torch.from_numpy(own).to(device)] = torch.cat(found)
        every: np.ndarray = self._ranks.sum(logits).cpu().numpy()
        return every

    def _tell(self, rows_per_s: float) -> None:
        if not self._ranks.leads or not self._execution.watchers:
            return
        batches = len(self._minibatches)
        step = Step(
            epoch=self._epoch + 1,
            done=self._epoch * batches + self._batch,
            total=self._total,
            loss=self._loss_sum / self._rows_done,
            learning_rate=float(self._schedule.get_last_lr()[0]),
            rows_per_s=rows_per_s,
        )
        for watcher in self._execution.watchers:
            watcher.step(step)

    def _save_if_due(self) -> None:
        plan = self._execution.checkpoints
        if plan is None or self._batch == len(self._minibatches):
            return
        self._saved_batches += 1
        every = plan.every_batches or math.inf
        if self._saved_batches >= every or time.monotonic() - self._saved_s >= plan.every_s:
            self.save()


def _on(device: torch.device, part: Part) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in part.inputs.items()}


def _losses(logits: Tensor, part: Part, device: torch.device) -> Tensor:
    """Return float32[N, H], the loss of each row and head."""
    weights = None if part.weights is None else part.weights.to(device)
    row_request = part.inputs[ROW_REQUEST].to(device)
    return row_losses(logits, part.labels.to(device), row_request, part.requests, weights)


def _keep_freed_memory() -> None:
    """Make glibc keep memory that a step frees; other C libraries are left alone.

    By default glibc returns large arrays at once and takes fresh pages for the next: page faults took half of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
