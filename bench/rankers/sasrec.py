"""SASRec: self-attentive sequential recommendation (Kang and McAuley, ICDM 2018, arXiv 1808.09781).

Causal self-attention over the user's actions; a candidate's score is the product of its vector and the last action's
hidden state. The body is shared by all heads, and each has its own linear map of the hidden state. It reads nothing but
the sequence and the candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.rankers.inputs import Actions, Inputs, PinVectors, Shape

#: Finite, so that a place without anything to attend to has no NaN; nobody reads what it computes.
_HIDDEN = -1e9


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V of one head, where a place sees itself and the places before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)

    def forward(self, states: Tensor, present: Tensor) -> Tensor:
        """Return float32[R, L, D].

        Args:
            states: float32[R, L, D], oldest first.
            present: bool[R, L], which places hold an action.
        """
        length, dim = states.shape[1:]
        scores = self.query(states) @ self.key(states).transpose(1, 2) / dim**0.5
        seen = torch.ones(length, length, dtype=torch.bool).tril() & present.unsqueeze(1)
        shares = scores.masked_fill(~seen, _HIDDEN).softmax(dim=-1)
        attended: Tensor = shares @ self.value(states)
        return attended


class PointwiseForward(nn.Module):
    """ReLU(x W_1 + b_1) W_2 + b_2 at each place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        """Return float32[R, L, D] from float32[R, L, D]."""
        mapped: Tensor = self.outer(self.inner(states).relu())
        return mapped


class Block(nn.Module):
    """Attention, then the pointwise layers, each as x + Dropout(g(LayerNorm(x)))."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.forward_layers = CausalAttention(dim), PointwiseForward(dim)
        self.before_attention, self.before_forward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, present: Tensor) -> Tensor:
        """Return float32[R, L, D]; the arguments are those of `CausalAttention`."""
        states = states + self.dropout(self.attention(self.before_attention(states), present))
        moved: Tensor = states + self.dropout(self.forward_layers(self.before_forward(states)))
        return moved


class SasRec(nn.Module):
    """One logit per head for every row."""

    def __init__(self, shape: Shape, dim: int = 64, blocks: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.pins = PinVectors(shape, dim)
        self.actions = Actions(shape, self.pins, dim)
        self.position = nn.Embedding(shape.length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, dropout) for _ in range(blocks))
        self.last = nn.LayerNorm(dim)
        self.of_head = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(shape.heads))
        self.bias = nn.Parameter(torch.zeros(shape.heads))
        with torch.no_grad():
            self.position.weight.mul_(0.1)

    def states(self, inputs: Inputs) -> Tensor:
        """Return float32[R, L, D], the hidden state of each place, oldest first; zeros where there is no action."""
        # The newest action is the last place, whatever the length, so that a position means an action's rank from now.
        present = (inputs["sequence_actions"] > 0).flip(1)
        states = self.dropout(self.actions(inputs).flip(1) + self.position.weight) * present.unsqueeze(-1)
        for block in self.blocks:
            states = block(states, present) * present.unsqueeze(-1)
        last: Tensor = self.last(states) * present.unsqueeze(-1)
        return last

    def forward(self, inputs: Inputs) -> Tensor:
        """Return float32[N, H]; users without an action get the same logits for every candidate."""
        newest = self.states(inputs)[:, -1]
        of_head = torch.stack([to_head(newest) for to_head in self.of_head], dim=1)
        candidates = self.pins(inputs["pin_embedding"], inputs["pin_number"])
        logits: Tensor = torch.einsum("nhd,nd->nh", of_head[inputs["row_request"]], candidates) + self.bias
        return logits
