"""The encoding of numbers in pieces, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pieces(nn.Module):
    """Encodes each of F numbers piecewise linearly: of T pieces of its range, how much of each lies below the number.

    A number of any distribution, such as a count, then needs no curve that the layers would have to learn (Gorishniy et
    al., 2022, arXiv 2203.05556). The pieces hold equally many training rows each.

    Columns are ordered by piece, then by number, so that engines compute them in long vectors.
    """

    lower: Tensor
    scale: Tensor

    def __init__(self, numbers: int, pieces: int) -> None:
        super().__init__()
        self.register_buffer("lower", torch.zeros(pieces, numbers))
        self.register_buffer("scale", torch.zeros(pieces, numbers))

    def forward(self, values: Tensor) -> Tensor:
        """Return float32[N, T * F], in [0, 1], from float32[N, F]."""
        repeated = torch.cat([values] * len(self.lower), dim=-1)
        return ((repeated - self.lower.flatten()) * self.scale.flatten()).clamp(0, 1)

    def fit(self, values: Tensor) -> None:
        """Divide the ranges of float32[N, F] training rows."""
        shares = torch.linspace(0, 1, len(self.lower) + 1, dtype=torch.float64)
        edges = torch.stack([torch.quantile(column, shares) for column in _sample(values).double().T], dim=1)
        width = edges[1:] - edges[:-1]
        self.lower.copy_(edges[:-1])
        # A piece without extent, where many rows have one number, says nothing.
        self.scale.copy_(torch.where(width > 1e-6, 1 / width, 0.0))


def _sample(values: Tensor, rows_max: int = 1 << 20) -> Tensor:
    """Return at most so many rows, evenly; more do not move the quantiles."""
    return values[:: -(-len(values) // rows_max)]
