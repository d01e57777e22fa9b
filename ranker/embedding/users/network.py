"""The network of a user's vector: a causal transformer over actions, and a tower for pins in the same space."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from feature_client.groups import Frozen
from ranker.embedding.users.sequences import TIME_NUMBERS, Windows

#: A temperature of unit vectors' dot products at the start of training, and what it never exceeds.
_TEMPERATURE, _TEMPERATURE_MAX = 10.0, 100.0


class NetworkSizes(Frozen):
    """The sizes of a network.

    Attributes:
        pins: rows of the table of pins that were known in training; 0 for a network that reads given vectors only.
        pin_dim: numbers of a pin's given vector; 0 for a network that reads none.
        actions: number of actions in the vocabulary.
        timed: whether actions have times.
        dim: numbers of a user's vector.
        layers: transformer layers.
        heads: attention heads.
        length_max: how many of a user's last actions are read.
    """

    pins: Annotated[int, Field(ge=0)]
    pin_dim: Annotated[int, Field(ge=0)]
    actions: Annotated[int, Field(ge=1)]
    timed: bool
    dim: Annotated[int, Field(ge=2, le=4096)]
    layers: Annotated[int, Field(ge=1, le=64)]
    heads: Annotated[int, Field(ge=1)]
    length_max: Annotated[int, Field(ge=1, le=4096)]


class Pins(nn.Module):
    """What the network knows of pins: a learned row for those of the training, and their given vectors."""

    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.table = nn.Embedding(sizes.pins + 1, sizes.dim, padding_idx=0)
        # Where there are given vectors, the table begins as a small correction of them.
        nn.init.normal_(self.table.weight, std=(0.1 if sizes.pin_dim else 1.0) * sizes.dim**-0.5)
        with torch.no_grad():
            self.table.weight[0] = 0
        self.given = nn.Linear(sizes.pin_dim, sizes.dim, bias=False) if sizes.pin_dim else None

    def forward(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Return float[..., D] of int64[...] rows and float[..., G] given vectors."""
        found: Tensor = self.table(rows)
        return found if self.given is None else found + self.given(vectors)


class Layer(nn.Module):
    """A pre-norm transformer layer whose attention knows how far apart actions are."""

    def __init__(self, sizes: NetworkSizes, dropout: float) -> None:
        super().__init__()
        dim = sizes.dim
        self.heads, self.drop = sizes.heads, nn.Dropout(dropout)
        self.norm_attention, self.norm_forward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.inputs, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.distance = nn.Parameter(torch.zeros(sizes.heads, int(_bucket(torch.tensor(sizes.length_max - 1))) + 1))
        self.hidden, self.forward_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode float[B, L, D]; row l of a sequence reads rows 0 to l."""
        count, length, dim = tokens.shape
        parts = self.inputs(self.norm_attention(tokens)).view(count, length, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        place = torch.arange(length, device=tokens.device)
        apart = place[:, None] - place
        bucket = _bucket(apart.clamp(min=0)).clamp(max=self.distance.shape[1] - 1)
        bias = self.distance[:, bucket].masked_fill(apart < 0, -math.inf)
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        tokens = tokens + self.drop(self.out(read.transpose(1, 2).reshape(count, length, dim)))
        found: Tensor = tokens + self.drop(self.forward_out(functional.gelu(self.hidden(self.norm_forward(tokens)))))
        return found


class UserNetwork(nn.Module):
    """One vector of length one after each action, which knows nothing of later ones."""

    def __init__(self, sizes: NetworkSizes, dropout: float = 0.0) -> None:
        super().__init__()
        dim = sizes.dim
        self.sizes = sizes
        self.pins = Pins(sizes)
        self.action = nn.Embedding(sizes.actions, dim)
        self.time = nn.Linear(TIME_NUMBERS, dim, bias=False) if sizes.timed else None
        # Small at first, so that the pins are not lost among them.
        for added in (self.action, self.time):
            if added is not None:
                nn.init.normal_(added.weight, std=0.1 * dim**-0.5)
        self.norm_in, self.norm_out, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(sizes, dropout) for _ in range(sizes.layers))
        self.user_hidden, self.user_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.pin_hidden, self.pin_out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(_TEMPERATURE)))

    def forward(self, rows: Tensor, vectors: Tensor, actions: Tensor, times: Tensor | None) -> Tensor:
        """Return the user's vector after each action, float[B, L, D]; see `states`."""
        return self.user_vectors(self.states(rows, vectors, actions, times))

    def states(self, rows: Tensor, vectors: Tensor, actions: Tensor, times: Tensor | None) -> Tensor:
        """Return what is known after each action, float[B, L, D].

        Args:
            rows: int64[B, L], of the table of pins; 0 for pins that are not in it.
            vectors: float[B, L, G], the pins' given vectors.
            actions: int64[B, L].
            times: float[B, L, TIME_NUMBERS]; None if the network reads none.
        """
        tokens: Tensor = self.pins(rows, vectors) + self.action(actions)
        if self.time is not None and times is not None:
            tokens = tokens + self.time(times)
        tokens = self.drop(self.norm_in(tokens))
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    def user_vectors(self, states: Tensor) -> Tensor:
        """Return float[..., D], the user's vectors for float[..., D] states."""
        found: Tensor = self.user_out(functional.gelu(self.user_hidden(self.norm_out(states))))
        return functional.normalize(found, dim=-1)

    def pin_vectors(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Return float[N, D], vectors of length one of pins in the space of users."""
        known = self.pins(rows, vectors)
        return functional.normalize(known + self.pin_out(functional.gelu(self.pin_hidden(known))), dim=-1)

    @property
    def temperature(self) -> Tensor:
        """By how much dot products of unit vectors are scaled to be logits."""
        found: Tensor = self.log_temperature.exp().clamp(max=_TEMPERATURE_MAX)
        return found


def tensors(read: Windows) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what the network reads of windows."""
    times = None if read.times is None else torch.from_numpy(read.times)
    return torch.from_numpy(read.rows), torch.from_numpy(read.vectors), torch.from_numpy(read.actions), times


def _bucket(apart: Tensor) -> Tensor:
    """Return the bucket of a distance: near ones have their own, far ones share, four to each doubling."""
    return (4 * torch.log2(1.0 + apart)).round().long()
