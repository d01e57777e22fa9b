"""The network: a transformer over the user's last actions that sees the candidate from its first layer on.

The shape follows TransAct (KDD 2023, arXiv 2306.00248): the candidate is concatenated to every action ("early fusion"),
two post-norm encoder layers without positions, the newest K outputs and a max-pool as the readout, then a full-rank
DCN-v2 cross network (arXiv 2008.13535) and one logit per head. One difference: the max-pool reads the first layer, so
that the last one computes only the K rows it is asked for; they still attend to the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: What a masked attention score becomes: finite, so that a row with nothing to attend to has no NaN.
_MASKED = -1e9


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """All sizes of a network."""

    heads: int
    actions: int
    surfaces: int
    scalars: int
    dim: int = 32
    sequence: bool = True
    action_dim: int = 8
    token_pin_dim: int = 12
    encoder_layers: int = 2
    encoder_hidden: int = 32
    readout_rows: int = 10
    readout_dim: int = 64
    surface_dim: int = 4
    cross_layers: int = 2
    hidden: tuple[int, ...] = (128, 64)
    #: In the layers after the cross network only: drawing masks for every token would double the training time.
    dropout: float = 0.1

    @property
    def token_dim(self) -> int:
        return self.action_dim + 2 * self.token_pin_dim


class EncoderLayer(nn.Module):
    """One post-norm transformer layer with a single head, written out so that it exports as plain products.

    With one head as wide as the tokens, the query and key maps only ever appear as their product, and so do the value
    and output maps; each pair is one matrix here, which computes the same functions with half the work. Key biases
    cancel in the softmax.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.query_key, self.value_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm_attention, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self._scale = dim**-0.5

    def forward(self, queries: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        """Encode float32[N, Q, D] rows that read float32[N, L, D]; `bias` float32[N, 1, L] is added to key scores."""
        scores = torch.matmul(self.query_key(queries) * self._scale, tokens.transpose(1, 2)) + bias
        attended = self.value_out(torch.matmul(torch.softmax(scores, dim=-1), tokens))
        queries = self.norm_attention(queries + attended)
        encoded: Tensor = self.norm_out(queries + self.feed_forward(queries))
        return encoded


class SequenceEncoder(nn.Module):
    """The user's actions, read with one candidate in mind: float32[N, `readout_dim` + `token_dim`]."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.action = nn.Embedding(config.actions + 1, config.action_dim)
        self.acted = nn.Linear(config.dim, config.token_pin_dim)
        self.candidate = nn.Linear(config.dim, config.token_pin_dim)
        self.layers = nn.ModuleList(
            EncoderLayer(config.token_dim, config.encoder_hidden) for _ in range(config.encoder_layers - 1)
        )
        self.last = EncoderLayer(config.token_dim, config.encoder_hidden)
        self.newest = nn.Linear(config.readout_rows * config.token_dim, config.readout_dim)
        self.pooled = nn.Linear(config.token_dim, config.token_dim)
        self._rows = config.readout_rows

    def forward(self, actions: Tensor, embeddings: Tensor, pin_embedding: Tensor, row_request: Tensor) -> Tensor:
        """Encode int64[R, L] actions (0 past the end) on float32[R, L, D] pins, for float32[N, D] candidates."""
        own = torch.cat([self.action(actions), self.acted(embeddings)], dim=-1)
        present = (actions != 0).to(own.dtype)
        # What does not depend on the candidate is computed once per request, then gathered per row.
        tokens = self._fuse(_per_row(own, row_request), self.candidate(pin_embedding))
        present_row = _per_row(present, row_request)
        bias = ((1.0 - present_row) * _MASKED).unsqueeze(1)
        for layer in self.layers:
            tokens = layer(tokens, tokens, bias)
        present_row = present_row.unsqueeze(-1)
        newest = self.last(tokens[:, : self._rows], tokens, bias) * present_row[:, : self._rows]
        pooled = (tokens * present_row).amax(dim=1)
        return torch.cat([self.newest(newest.flatten(1)), self.pooled(pooled)], dim=-1)

    def _fuse(self, own: Tensor, candidate: Tensor) -> Tensor:
        repeated = candidate.unsqueeze(1).expand(-1, own.shape[1], -1)
        return torch.cat([own, repeated], dim=-1)


class CrossNetwork(nn.Module):
    """DCN-v2: each layer multiplies the input with a linear map of what the layers before made of it."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, inputs: Tensor) -> Tensor:
        crossed = inputs
        for layer in self.layers:
            crossed = inputs * layer(crossed) + crossed
        return crossed


class RankerNetwork(nn.Module):
    """One logit per head for every (request, candidate) row.

    Inputs carry the names of the manifest's; what belongs to a request comes once, and `row_request` says which rows
    are its.
    """

    user_mean: Tensor
    user_deviation: Tensor
    pin_mean: Tensor
    pin_deviation: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        for side in ("user", "pin"):
            self.register_buffer(f"{side}_mean", torch.zeros(config.scalars))
            self.register_buffer(f"{side}_deviation", torch.ones(config.scalars))
        self.encoder = SequenceEncoder(config) if config.sequence else None
        self.surface = nn.Embedding(config.surfaces, config.surface_dim)
        width = 5 * config.dim + 2 * config.scalars + config.surface_dim
        width += config.readout_dim + config.token_dim if config.sequence else 0
        self.cross = CrossNetwork(width, config.cross_layers)
        layers: list[nn.Module] = []
        for size in config.hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(config.dropout)]
            width = size
        self.deep = nn.Sequential(*layers, nn.Linear(width, config.heads))

    def forward(
        self,
        user_embedding: Tensor,
        user_scalars: Tensor,
        surface: Tensor,
        query: Tensor,
        pin_embedding: Tensor,
        pin_scalars: Tensor,
        row_request: Tensor,
        sequence_actions: Tensor | None = None,
        sequence_embeddings: Tensor | None = None,
    ) -> Tensor:
        """Return float32[N, H] logits.

        Args:
            user_embedding: float32[R, D].
            user_scalars: float32[R, S].
            surface: int64[R].
            query: float32[R, D], zeros without a query.
            pin_embedding: float32[N, D].
            pin_scalars: float32[N, S].
            row_request: int64[N].
            sequence_actions: int64[R, L], newest first, 0 past the end; needed by networks that read the sequence.
            sequence_embeddings: float32[R, L, D].
        """
        user, asked = _per_row(user_embedding, row_request), _per_row(query, row_request)
        parts = [
            user,
            _per_row((user_scalars - self.user_mean) / self.user_deviation, row_request),
            _per_row(self.surface(surface), row_request),
            asked,
            pin_embedding,
            (pin_scalars - self.pin_mean) / self.pin_deviation,
            # Products of unit vectors are small beside standardised scalars; scaled to the same size.
            self.config.dim * pin_embedding * asked,
            self.config.dim * pin_embedding * user,
        ]
        if self.encoder is not None:
            parts.append(self.encoder(sequence_actions, sequence_embeddings, pin_embedding, row_request))
        logits: Tensor = self.deep(self.cross(torch.cat(parts, dim=-1)))
        return logits

    def standardise(self, user_scalars: Tensor, pin_scalars: Tensor) -> None:
        """Take the constants that scalars are standardised with from float32[R, S] and float32[N, S]."""
        for side, values in (("user", user_scalars), ("pin", pin_scalars)):
            getattr(self, f"{side}_mean").copy_(values.mean(dim=0))
            deviation = values.std(dim=0, unbiased=False)
            # A scalar that never varied says nothing; dividing by its deviation would make noise of any later change.
            getattr(self, f"{side}_deviation").copy_(torch.where(deviation < 1e-3, 1.0, deviation))


def _per_row(values: Tensor, row_request: Tensor) -> Tensor:
    """Return [N, ...] from [R, ...]: each row's request."""
    return torch.index_select(values, 0, row_request)
