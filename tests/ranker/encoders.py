"""Random encoders and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    actions: int = 4
    dim: int = 32
    action_dim: int = 32
    token_pin_dim: int = 32
    encoder_layers: int = 2
    encoder_hidden: int = 32
    readout_rows: int = 10
    readout_pool: bool = False


M = TypeVar("M", bound=torch.nn.Module)


def shaken(module: M, seed: int, scale: float = 1.0) -> M:
    """Draw every parameter at random, including norms' gains and biases, so that no rewrite can rely on a default."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=drawn, dtype=parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
    return module.eval()


def batch(
    sizes: Sizes, fills: tuple[int, ...], length: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return actions, embeddings, candidates and row_request; request r has `fills[r]` actions and some of the rows."""
    drawn = torch.Generator().manual_seed(seed)
    requests = len(fills)
    actions = torch.randint(1, sizes.actions + 1, (requests, length), generator=drawn)
    actions[torch.arange(length) >= torch.tensor(fills).unsqueeze(1)] = 0
    embeddings = torch.randn(requests, length, sizes.dim, generator=drawn, dtype=torch.float64).to(dtype)
    candidates = torch.randn(rows, sizes.dim, generator=drawn, dtype=torch.float64).to(dtype)
    return actions, embeddings, candidates, torch.arange(rows) * requests // rows
