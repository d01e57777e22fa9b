"""DIN: a deep interest network (Zhou et al., KDD 2018, arXiv 1706.06978).

A local activation unit weighs each action by the candidate, without a softmax over the actions, so that the sum keeps
the strength of the interest. The weighted sum joins all other features in a deep network with Dice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.rankers.inputs import Actions, DenseFeatures, Inputs, PinVectors, Shape


class Dice(nn.Module):
    """p(s) s + (1 - p(s)) a s with p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + e)), the paper's equation 3.

    Mean and variance are those of the minibatch, and moving averages when it scores.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.slope = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor) -> Tensor:
        """Return float32[N, W] from float32[N, W]."""
        share = torch.sigmoid(self.normal(values))
        return share * values + (1 - share) * self.slope * values


class ActivationUnit(nn.Module):
    """Weighs each action by the candidate: a layer with PReLU on both, their difference and product, then a number."""

    def __init__(self, dim: int, hidden: int = 36) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * dim, hidden)
        self.slope = nn.Parameter(torch.tensor(0.25))
        self.out = nn.Linear(hidden, 1)

    def forward(self, candidates: Tensor, actions: Tensor) -> Tensor:
        """Return float32[N, L], the weight of each action for each candidate of a request.

        The layer reads [candidate, action, candidate - action, candidate * action]. For one action all of that is a
        linear map of the candidate, so a request takes a single product, whatever its candidates.

        Args:
            candidates: float32[N, D].
            actions: float32[L, D], without padding.
        """
        of_candidate, of_action, of_difference, of_product = self.hidden.weight.chunk(4, dim=1)
        maps = actions.unsqueeze(1) * of_product + (of_candidate + of_difference)
        constants = functional.linear(actions, of_action - of_difference, self.hidden.bias)
        hidden = functional.linear(candidates, maps.flatten(0, 1), constants.flatten())
        hidden = hidden.view(len(candidates), *constants.shape)
        # PReLU's values are a sum of the layer's and of ReLU's, so their product with the weights is a sum of products.
        linear, bent = (functional.linear(values, self.out.weight) for values in (hidden, hidden.relu()))
        weights: Tensor = self.slope * linear + (1 - self.slope) * bent + self.out.bias
        return weights.squeeze(-1)


class Din(nn.Module):
    """One logit per head for every row."""

    def __init__(self, shape: Shape, dim: int = 32, hidden: tuple[int, ...] = (200, 80)) -> None:
        super().__init__()
        self.dense = DenseFeatures(shape)
        self.pins = PinVectors(shape, dim)
        self.actions = Actions(shape, self.pins, dim)
        self.activation = ActivationUnit(dim)
        width = self.dense.width + 2 * dim
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), Dice(size)]
            width = size
        self.deep = nn.Sequential(*layers, nn.Linear(width, shape.heads))

    def forward(self, inputs: Inputs) -> Tensor:
        """Return float32[N, H]."""
        candidates = self.pins(inputs["pin_embedding"], inputs["pin_number"])
        interest = self.interest(candidates, inputs)
        logits: Tensor = self.deep(torch.cat([self.dense(inputs), candidates, interest], dim=-1))
        return logits

    def interest(self, candidates: Tensor, inputs: Inputs) -> Tensor:
        """Return float32[N, D], the sum of each row's actions by their weights; rows are in the order of requests."""
        present = inputs["sequence_actions"] > 0
        counts = torch.bincount(inputs["row_request"], minlength=len(present)).tolist()
        sums = []
        of_requests = zip(
            torch.split(candidates, counts), self.actions(inputs), present.sum(dim=1).tolist(), strict=True
        )
        for own, actions, length in of_requests:
            newest = actions[:length]
            sums.append(self.activation(own, newest) @ newest if length else torch.zeros_like(own))
        return torch.cat(sums)
