"""One training over several processes: who this one is, its share of the work, and what the ranks tell each other.

Processes are started by torchrun, which names them in the environment. A process alone is rank 0 of 1 and needs no
group; then everything here costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    """This process among those that train together. Rank 0 leads: it alone reports, writes and publishes."""

    rank: int = 0
    world: int = 1
    device: torch.device = _CPU

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, requests: np.ndarray) -> np.ndarray:
        """Return this rank's requests; together the ranks take each once. It may be none."""
        return requests[self.rank :: self.world]

    def sum(self, values: Tensor) -> Tensor:
        """Add up all ranks' values; every rank gets the same, to the bit."""
        if self.world > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def told(self, content: bytes) -> bytes:
        """Return rank 0's content on every rank; the others' is ignored."""
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
        """Let rank 0 through before the others: what it downloads, they find."""
        if not self.leads:
            self._meet()
        yield
        if self.leads:
            self._meet()

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return a network that averages its gradients over all ranks, and starts from rank 0's weights."""
        if self.world == 1:
            return network
        # The buffers are constants of the data; sending them before every step would buy nothing.
        return DistributedDataParallel(network, forward_sync_buffers=False)

    def _meet(self) -> None:
        # A barrier; `distributed.barrier` would have to be told the device.
        self.sum(torch.zeros(1, device=self.device))


ALONE = Ranks()


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the group that torchrun started this process in, if any, and leave it at the end.

    Args:
        device: `cpu`, `cuda`, or `auto` for the latter where there is one; each rank takes one.

    Raises:
        SettingError: there is no such device here.
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
    """Return how many cores this process may use, shared evenly with the ranks beside it."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


#: What torchrun puts into the environment, and what holds without it.
_TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}


def _device(name: str, local_rank: int) -> torch.device:
    if name not in {"auto", "cpu", "cuda"}:
        raise SettingError(f"no device {name!r}; there are auto, cpu and cuda")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not found):
        return _CPU
    if local_rank >= found:
        raise SettingError(f"rank {local_rank} of this machine finds {found} CUDA devices; take --device cpu, or fewer")
    return torch.device("cuda", local_rank)
