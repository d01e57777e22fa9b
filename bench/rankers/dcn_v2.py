"""DCN-v2: a cross network of full rank, then a deep one (Wang et al., WWW 2021, arXiv 2008.13535).

The stacked form. It reads no sequence: the user's vector, which sums up the actions, stands for it.
"""

from __future__ import annotations

from torch import Tensor, nn

from bench.rankers.inputs import DenseFeatures, Inputs, Shape


class FullRankCross(nn.Module):
    """Layers of x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, the paper's equation 1."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, first: Tensor) -> Tensor:
        """Return float32[N, W] from float32[N, W]."""
        crossed = first
        for layer in self.layers:
            crossed = first * layer(crossed) + crossed
        return crossed


class DcnV2(nn.Module):
    """One logit per head for every row."""

    def __init__(self, shape: Shape, cross_layers: int = 2, hidden: tuple[int, ...] = (128, 64)) -> None:
        super().__init__()
        self.dense = DenseFeatures(shape)
        width = self.dense.width
        self.cross = FullRankCross(width, cross_layers)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.deep = nn.Sequential(*layers, nn.Linear(width, shape.heads))

    def forward(self, inputs: Inputs) -> Tensor:
        """Return float32[N, H]."""
        logits: Tensor = self.deep(self.cross(self.dense(inputs)))
        return logits
