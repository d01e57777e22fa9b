"""The networks that make a pin's vector of its own features and those of its neighbours.

- `khop`: means over a sample of the pins one and two hops away, drawn anew each time (GraphSAGE, Hamilton et al.,
  2017).
- `pooled`: the mean over the pins that random walks visit most, weighted by their visits (PinSage, Ying et al., 2018).
- `transformer`: besides that mean, an encoder over [the pin; its neighbours], and for each of its heads a mean over the
  neighbours, weighted by the attention that it pays them.

What is known of a pin are its features, and, for pins of the training, a vector that is trained with the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranker.errors import SettingError

Variant = Literal["khop", "pooled", "transformer"]
#: How far each head of the transformer follows the weights of the walks at first: from not at all to twice.
_TRUST = (0.0, 0.5, 1.0, 2.0)
#: Stands for the logarithm of the weight of a neighbour that is not there.
_NONE = -1e9


@dataclass(frozen=True, slots=True)
class PinNetworkSettings:
    """The sizes of a network.

    Attributes:
        variant: how neighbours are read.
        dim: numbers of what the network says of a pin: of its vector, but for features that are kept.
        trained_dim: numbers of the trained vector of each pin of the training; 0 for none.
        hidden: width of the hidden layer.
        layers: of the transformer.
        dropped: share of the hidden numbers that training leaves out.
        neighbours_dropped: share of the neighbours to which training lets the transformer pay no attention.
        own_dropped: share of the pins whose own features training leaves out, and of those whose trained vector it
            leaves out, also where they are neighbours: new pins have neither, or only features.
        features_kept: whether a vector begins with the pin's features, at a length of one together. The dot product of
            two pins that have any is then a weighted mean of what the features and the network say.
    """

    variant: Variant = "pooled"
    dim: int = 64
    trained_dim: int = 64
    hidden: int = 256
    layers: int = 1
    dropped: float = 0.1
    neighbours_dropped: float = 0.2
    own_dropped: float = 0.25
    features_kept: bool = False

    def __post_init__(self) -> None:
        if self.variant == "transformer" and self.dim % len(_TRUST):
            raise SettingError(
                f"a transformer divides the {self.dim} numbers of a vector among {len(_TRUST)} heads; "
                f"use a multiple of {len(_TRUST)}"
            )

    def width(self, features: int) -> int:
        """Return how many numbers the vector of a pin with F features has."""
        return self.dim + (features if self.features_kept else 0)


@dataclass(frozen=True, slots=True)
class Hop:
    """Neighbours of N pins, as rows of a table with what is known of them.

    Attributes:
        index: int64[N, K].
        weights: float32[N, K]; 0 for a neighbour that is not there.
    """

    index: Tensor
    weights: Tensor


class PinNetwork(nn.Module):
    """Turns pins and neighbours into a vector of length one for each task.

    Args:
        settings: the sizes.
        features: F, the numbers of a pin's features.
        neighbours: K, the most neighbours that a pin has.
        pins: P, the pins of the training.
        tasks: names of the tasks.
    """

    def __init__(
        self, settings: PinNetworkSettings, features: int, neighbours: int, pins: int, tasks: Sequence[str]
    ) -> None:
        super().__init__()
        self.settings = settings
        width = features + settings.trained_dim
        inputs = width * (3 if settings.variant == "khop" else 2)
        self.encoder = None
        if settings.variant == "transformer":
            self.encoder = _Encoder(width, settings.dim, neighbours, settings.layers, settings.neighbours_dropped)
            inputs += settings.dim + len(_TRUST) * width
        self.trained = nn.Parameter(torch.randn(pins, settings.trained_dim) * 0.1)
        self.hidden = nn.Linear(inputs, settings.hidden)
        self.dropout = nn.Dropout(settings.dropped)
        self.heads = nn.ModuleDict({name: nn.Linear(settings.hidden + inputs, settings.dim) for name in tasks})
        # Of what the network says, where the features have a length of one.
        self.log_lengths = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(0.0)) for name in (tasks if settings.features_kept else ())}
        )
        # A cosine is at most 1, which is too little to tell one pin from thousands.
        self.log_scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(10.0).log()) for name in tasks})

    def forward(self, own: Tensor, table: Tensor, hops: Sequence[Hop]) -> dict[str, Tensor]:
        """Return float32[N, dim] by task; with `features_kept`, float32[N, F + dim].

        Args:
            own: float32[N, F + trained_dim], what is known of each pin.
            table: float32[M, F + trained_dim], what is known of the pins that `hops` name.
            hops: one; of `khop`, two.
        """
        features = own.shape[1] - self.settings.trained_dim
        if self.training:
            known = torch.rand(len(own), 1) >= self.settings.own_dropped
            own = torch.cat([own[:, :features] * known, own[:, features:]], dim=1)
        inputs = [own, *(_mean(table, hop) for hop in hops)]
        if self.encoder is not None:
            inputs += self.encoder(own, table, hops[0])
        found = torch.cat(inputs, dim=1)
        found = torch.cat([self.dropout(functional.relu(self.hidden(found))), found], dim=1)
        vectors = {name: functional.normalize(head(found), dim=1) for name, head in self.heads.items()}
        if not self.settings.features_kept:
            return vectors
        given = functional.normalize(own[:, :features], dim=1)
        return {
            name: functional.normalize(torch.cat([given, self.log_lengths[name].exp() * vector], dim=1), dim=1)
            for name, vector in vectors.items()
        }


def _mean(table: Tensor, hop: Hop) -> Tensor:
    """Return float32[N, W], the weighted mean of the neighbours; zeros for pins without any."""
    sums = functional.embedding_bag(hop.index, table, per_sample_weights=hop.weights, mode="sum")
    return sums / hop.weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


class _Encoder(nn.Module):
    """A transformer over [pin; neighbours], of which the row of the pin is read.

    A row has room for little of what is known of the neighbours, so they are also pooled as they are, by the attention
    of each head in the last layer.
    """

    def __init__(self, width: int, dim: int, neighbours: int, layers: int, dropped: float) -> None:
        super().__init__()
        self.dropped = dropped
        self.pin, self.neighbour = nn.Linear(width, dim), nn.Linear(width, dim, bias=False)
        self.places = nn.Parameter(torch.zeros(neighbours, dim))
        self.trust = nn.Parameter(torch.tensor(_TRUST))
        self.layers = nn.ModuleList([_Layer(dim) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, own: Tensor, table: Tensor, hop: Hop) -> list[Tensor]:
        """Return float32[N, dim], and for each head float32[N, W]; zeros for pins without neighbours."""
        places = self.places[: hop.index.shape[1]]
        # Projecting the table, not its rows as often as they occur, is the same, and less work.
        neighbours = functional.embedding(hop.index, self.neighbour(table)) + places
        tokens = torch.cat([self.pin(own)[:, None], neighbours], dim=1)
        there = hop.weights > 0
        if self.training:
            there = there & (torch.rand(there.shape) >= self.dropped)
        logs = hop.weights.clamp(min=1e-9).log()[:, None] * self.trust[:, None]
        bias = functional.pad(torch.where(there[:, None], logs, _NONE), (1, 0))
        attention = bias
        for number, layer in enumerate(self.layers, 1):
            tokens, attention = layer(tokens, bias, rows=1 if number == len(self.layers) else tokens.shape[1])
        paid = attention[:, :, 0, 1:]  # neighbours that are not there get none
        paid = paid / paid.sum(dim=2, keepdim=True).clamp(min=1e-9)
        pooled = (
            functional.embedding_bag(hop.index, table, per_sample_weights=by_head.contiguous(), mode="sum")
            for by_head in paid.unbind(dim=1)
        )
        return [self.norm(tokens[:, 0]), *pooled]


class _Layer(nn.Module):
    """A pre-norm encoder layer that computes only its first rows, and what attention they pay: [N, H, rows, K + 1]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.query, self.keys_values, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor, bias: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        normed = self.norms[0](tokens)
        keys, values = self.keys_values(normed).chunk(2, dim=-1)
        query, keys, values = (
            part.unflatten(-1, (len(_TRUST), -1)).transpose(1, 2)
            for part in (self.query(normed[:, :rows]), keys, values)
        )
        attention = (query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5 + bias[:, :, None]).softmax(dim=3)
        found = tokens[:, :rows] + self.out((attention @ values).transpose(1, 2).flatten(2))
        return found + self.feed_forward(self.norms[1](found)), attention
