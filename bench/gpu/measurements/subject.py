"""The measured encoder, in its published form and in the Triton kernel. Only this file uses the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.gpu.plan import DRY_LENGTH, LENGTH
from kernels.encoder import EncoderShape
from kernels.gpu.encoder_node import NODE, encoder_alone
from kernels.gpu.tiles import TILES, Launch, tiles_of
from kernels.gpu.torch_network import TorchNetwork
from kernels.gpu.triton_encoder import TritonEncoder
from ranker.network.encoder import EarlyFusion
from ranker.network.serving_form import fold_early

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of an encoder, as in `ranker.network.encoder.EncoderSizes`."""

    actions: int = 5
    dim: int = 32
    action_dim: int = 32
    token_pin_dim: int = 32
    encoder_layers: int = 2
    encoder_hidden: int = 32
    readout_rows: int = 10
    readout_pool: bool = False


#: Sizes with the public baseline's tokens of 64 numbers.
SKUT_LIKE = Sizes(dim=16, action_dim=32, token_pin_dim=16, encoder_hidden=64)


class Batch:
    """Random requests and rows, from a fixed seed.

    Attributes:
        actions: int64[R, L], 0 for no action.
        embeddings: float32[R, L, E].
        candidates: float32[N, E].
        row_request: int64[N].
        row_splits: int32[R + 1], on the host.
    """

    def __init__(
        self,
        rows: list[int],
        device: torch.device,
        sizes: Sizes | None = None,
        length: int = LENGTH,
        actions: list[int] | None = None,
    ) -> None:
        """Draw a batch of `len(rows)` requests with these numbers of rows and `actions` (default: `length` actions)."""
        sizes = sizes or Sizes()
        drawn = torch.Generator().manual_seed(0)
        requests = len(rows)
        there = torch.arange(length) < torch.tensor(actions or [length] * requests).unsqueeze(1)
        codes = torch.randint(1, sizes.actions + 1, (requests, length), generator=drawn)
        self.actions = (codes * there).to(device)
        self.embeddings = torch.randn(requests, length, sizes.dim, generator=drawn).to(device)
        self.candidates = torch.randn(sum(rows), sizes.dim, generator=drawn).to(device)
        self.row_splits = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
        self.row_request = torch.repeat_interleave(torch.arange(requests), torch.tensor(rows)).to(device)

    @property
    def rows(self) -> int:
        return len(self.candidates)


class GpuSubject:
    """An encoder with seeded weights."""

    def __init__(self, device: torch.device, sizes: Sizes | None = None, length: int = LENGTH) -> None:
        sizes = sizes or Sizes()
        torch.manual_seed(0)
        self._device, self._published = device, EarlyFusion(sizes).eval()
        self._weights = {name: weight.detach().numpy() for name, weight in fold_early(self._published).items()}
        self._shape = EncoderShape(length, sizes.readout_rows, 2)

    def exact(self, batch: Batch) -> Tensor:
        """Compute the published form in float64, on the CPU."""
        with torch.inference_mode():
            found: Tensor = self._published.cpu().double()(
                batch.actions.cpu(),
                batch.embeddings.cpu().double(),
                batch.candidates.cpu().double(),
                batch.row_request.cpu(),
            )
            self._published.float()
        return found

    def fused(self, batch: Batch, compiled: tuple[int, int] | None = None, tile_rows: int = 0) -> Run:
        """Return a function that runs the Triton kernel on a batch, including the work per request before it.

        Args:
            batch: the batch.
            compiled: (actions of a block, warps); None means the kernel's default.
            tile_rows: rows in a tile; 0 means the kernel's default.
        """
        kernel = TritonEncoder(self._weights, self._shape, Launch(*compiled) if compiled else None)
        network = TorchNetwork(encoder_alone(kernel), self._device, {NODE: kernel.run})
        given = {
            "actions": batch.actions,
            "embeddings": batch.embeddings,
            "candidates": batch.candidates,
            TILES: torch.from_numpy(tiles_of(batch.row_splits, tile_rows)).to(self._device),
        }

        def run() -> Tensor:
            with torch.inference_mode():
                return network(given)

        return run

    def published(self, batch: Batch, rows_at_once: int, *, compiled: bool = False) -> Run:
        """Return a function that runs the plain modules with bf16 products. They need half a megabyte per row."""
        module = self._published.to(self._device)
        called = torch.compile(module) if compiled else module

        def run() -> Tensor:
            with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16):
                parts = [slice(start, start + rows_at_once) for start in range(0, batch.rows, rows_at_once)]
                found = [
                    called(batch.actions, batch.embeddings, batch.candidates[part], batch.row_request[part])
                    for part in parts
                ]
                return torch.cat(found)

        return run


def device_of(*, dry_run: bool) -> torch.device:
    """Return the measured device: a GPU, or always the CPU in a dry run."""
    return torch.device("cpu" if dry_run else "cuda")


def length_of(*, dry_run: bool) -> int:
    return DRY_LENGTH if dry_run else LENGTH
