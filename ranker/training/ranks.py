"""Training over several processes: the rank of this process, its share of the work, and exchange between ranks.

torchrun starts the processes and sets their ranks in the environment. A single process is rank 0 of 1 and needs no
group; nothing here costs it anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kernels.cores import cores
from ranker.errors import SettingError

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together. Only rank 0, the leader, reports, writes and publishes."""

    rank: int = 0
    world: int = 1
    device: torch.device = _CPU

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, requests: np.ndarray) -> np.ndarray:
        """Return this rank's requests, possibly none. Each request belongs to exactly one rank."""
        return requests[self.rank :: self.world]

    def sum(self, values: Tensor) -> Tensor:
        """Add up the values of all ranks; every rank gets the same result, to the bit."""
        if self.world > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def told(self, content: bytes) -> bytes:
        """Return the content of rank 0 on every rank; the content of other ranks is ignored."""
        if self.world == 1:
            return content
        size = torch.tensor([len(content)], device=self.device)
        distributed.broadcast(size, 0)
        if not int(size):
            return b""
        received = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.leads:
            received.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        distributed.broadcast(received, 0)
        return received.cpu().numpy().tobytes()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, so that the other ranks find what it downloads."""
        if not self.leads:
            self._meet()
        yield
        if self.leads:
            self._meet()

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return a network that averages its gradients over all ranks and starts from the weights of rank 0."""
        if self.world == 1:
            return network
        # The buffers are constants of the data, so they need not be sent before every step.
        return DistributedDataParallel(network, forward_sync_buffers=False)

    def gradients_kept_apart(self, network: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
        """Let a step of `parallel` add to this rank's own gradients without averaging them, unless it is the last."""
        if unless or not isinstance(network, DistributedDataParallel):
            return nullcontext()
        apart: AbstractContextManager[None] = network.no_sync()
        return apart

    def _meet(self) -> None:
        # A barrier; `distributed.barrier` would need the device as an argument.
        self.sum(torch.zeros(1, device=self.device))


ALONE = Ranks()


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that torchrun started, if any, and leave it at the end.

    Args:
        device: `cpu`, `cuda`, or `auto`, which means `cuda` if it is available; each rank uses one GPU.

    Raises:
        SettingError: the device is unknown or not available.
    """
    world, rank, local = (int(os.environ.get(name, at)) for name, at in _TORCHRUN.items())
    chosen = _device(device, local)
    if world == 1:
        yield Ranks(device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, chosen)
    finally:
        distributed.destroy_process_group()


def threads_of_this_process() -> int:
    """Return the number of cores for this process: the available cores, divided by the ranks on this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


#: Environment variables that torchrun sets, and their values without it.
_TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}


def _device(name: str, local_rank: int) -> torch.device:
    if name not in {"auto", "cpu", "cuda"}:
        raise SettingError(f"unknown device {name!r}; choose one of auto, cpu, cuda")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return _CPU
    if local_rank >= found:
        raise SettingError(
            f"rank {local_rank} needs a CUDA device of its own, but there are {found}; use --device cpu or fewer "
            "processes"
        )
    return torch.device("cuda", local_rank)
