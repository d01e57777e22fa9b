"""The encoder of the user's last actions as published: plain modules, written for readability.

The architecture follows TransAct (KDD 2023, arXiv 2306.00248): one token per action is [action; pin; candidate] ("early
fusion"), layers are post-norm without positions, and the readout takes the outputs of the K newest actions, optionally
with a max-pool over all outputs. `ranker.network.serving_form` computes the same from the same parameters at a fraction
of the cost; these modules are its oracle.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

#: Value of a masked attention score: finite, so that a row with nothing to attend to has no NaN.
MASKED = -1e9

#: Added to the variance in every norm.
EPSILON = 1e-5


class EncoderSizes(Protocol):
    """The sizes that an encoder reads from a network's configuration."""

    @property
    def actions(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def token_pin_dim(self) -> int: ...
    @property
    def encoder_layers(self) -> int: ...
    @property
    def encoder_hidden(self) -> int: ...
    @property
    def readout_rows(self) -> int: ...
    @property
    def readout_pool(self) -> bool: ...


class Attention(nn.Module):
    """Single-head scaled dot-product attention."""

    def __init__(self, queries: int, keys: int, width: int | None = None) -> None:
        super().__init__()
        width = width or queries
        # A bias of the keys would add the same to all scores of a query, and the softmax would cancel it.
        self.query, self.key = nn.Linear(queries, width), nn.Linear(keys, width, bias=False)
        self.value, self.out = nn.Linear(keys, width), nn.Linear(width, queries)
        self.scale = width**-0.5

    def forward(self, queries: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        """Let float[N, Q, D] queries attend to float[N, L, E] tokens; `bias` float[N, 1, L] is added to all scores."""
        scores = torch.matmul(self.query(queries), self.key(tokens).transpose(1, 2)) * self.scale + bias
        attended: Tensor = self.out(torch.matmul(torch.softmax(scores, dim=-1), self.value(tokens)))
        return attended


class EncoderLayer(nn.Module):
    """One post-norm transformer layer: what `nn.TransformerEncoderLayer` computes with one head and no dropout."""

    def __init__(self, dim: int, hidden: int, keys: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(dim, keys or dim)
        self.hidden, self.feed_forward = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm_attention, self.norm_out = nn.LayerNorm(dim, EPSILON), nn.LayerNorm(dim, EPSILON)

    def forward(self, queries: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        """Encode float[N, Q, D] queries over float[N, L, E] tokens; `bias` float[N, 1, L] is added to all scores."""
        queries = self.norm_attention(queries + self.attention(queries, tokens, bias))
        encoded: Tensor = self.norm_out(queries + self.feed_forward(torch.relu(self.hidden(queries))))
        return encoded


class ActionTokens(nn.Module):
    """The part of every token that does not depend on the candidate: [action; pin]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.action = nn.Embedding(sizes.actions + 1, sizes.action_dim)
        self.pin = nn.Linear(sizes.dim, sizes.token_pin_dim)
        self.width = sizes.action_dim + sizes.token_pin_dim

    def forward(self, actions: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return float[R, L, T] tokens, and float[R, L] with 1 where there is an action."""
        own = torch.cat([self.action(actions), self.pin(embeddings)], dim=-1)
        return own, (actions != 0).to(own.dtype)


class EarlyFusion(nn.Module):
    """Every token contains the candidate, so each candidate has its own encoding of the sequence: float[N, `width`]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.tokens = ActionTokens(sizes)
        self.candidate = nn.Linear(sizes.dim, sizes.token_pin_dim)
        dim = self.tokens.width + sizes.token_pin_dim
        self.layers = nn.ModuleList(EncoderLayer(dim, sizes.encoder_hidden) for _ in range(sizes.encoder_layers))
        self.readout = Readout(dim, sizes)
        self.width = self.readout.width

    def forward(self, actions: Tensor, embeddings: Tensor, pin_embedding: Tensor, row_request: Tensor) -> Tensor:
        """Encode int64[R, L] actions (0 past the end) on float[R, L, D] pins, for float[N, D] candidates."""
        own, present = self.tokens(actions, embeddings)
        own, present = per_row(own, row_request), per_row(present, row_request)
        candidate = self.candidate(pin_embedding).unsqueeze(1).expand(-1, own.shape[1], -1)
        tokens = torch.cat([own, candidate], dim=-1)
        bias = absent_bias(present)
        for layer in self.layers:
            tokens = layer(tokens, tokens, bias)
        encoded: Tensor = self.readout(tokens, present)
        return encoded


class LateFusion(nn.Module):
    """Encodes the sequence alone, once per request; candidates join after the readout: float[R, `width`]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.tokens = ActionTokens(sizes)
        dim = self.tokens.width
        self.layers = nn.ModuleList(EncoderLayer(dim, sizes.encoder_hidden) for _ in range(sizes.encoder_layers))
        self.readout = Readout(dim, sizes)
        self.width = self.readout.width

    def forward(self, actions: Tensor, embeddings: Tensor, *_: Tensor) -> Tensor:
        tokens, present = self.tokens(actions, embeddings)
        bias = absent_bias(present)
        for layer in self.layers:
            tokens = layer(tokens, tokens, bias)
        read: Tensor = self.readout(tokens, present)
        return read


class CrossFusion(nn.Module):
    """Encodes the context once per request; every candidate then attends to it (DCAT, PinFM): float[N, `width`]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.tokens = ActionTokens(sizes)
        self.candidate = nn.Linear(sizes.dim, sizes.token_pin_dim)
        dim = self.tokens.width
        self.layers = nn.ModuleList(EncoderLayer(dim, sizes.encoder_hidden) for _ in range(sizes.encoder_layers - 1))
        self.last = EncoderLayer(sizes.token_pin_dim, sizes.encoder_hidden, keys=dim)
        self.width = sizes.token_pin_dim

    def forward(self, actions: Tensor, embeddings: Tensor, pin_embedding: Tensor, row_request: Tensor) -> Tensor:
        tokens, present = self.tokens(actions, embeddings)
        bias = absent_bias(present)
        for layer in self.layers:
            tokens = layer(tokens, tokens, bias)
        query = self.candidate(pin_embedding).unsqueeze(1)
        read = self.last(query, per_row(tokens, row_request), per_row(bias, row_request)).squeeze(1)
        # Without any action there is no context, and the even mixture of padding must not be taken for one.
        context: Tensor = read * per_row(present[:, :1], row_request)
        return context


class Readout(nn.Module):
    """The concatenated outputs of the newest actions and, optionally, a max-pool over all: float[N, `width`]."""

    def __init__(self, dim: int, sizes: EncoderSizes) -> None:
        super().__init__()
        self.rows = sizes.readout_rows
        self.pooled = nn.Linear(dim, dim) if sizes.readout_pool else None
        self.width = dim * (self.rows + sizes.readout_pool)

    def forward(self, encoded: Tensor, present: Tensor) -> Tensor:
        """Read float[N, L, D] outputs; `present` float[N, L] marks actions, and absent outputs are read as zeros."""
        encoded = encoded * present.unsqueeze(-1)
        newest = encoded[:, : self.rows].flatten(1)
        if self.pooled is None:
            return newest
        return torch.cat([newest, self.pooled(encoded.amax(dim=1))], dim=-1)


def absent_bias(present: Tensor) -> Tensor:
    """Return float[N, 1, L] to add to attention scores: 0 where float[N, L] is 1, `MASKED` where it is 0."""
    return ((1.0 - present) * MASKED).unsqueeze(1)


def per_row(values: Tensor, row_request: Tensor) -> Tensor:
    """Return [N, ...] from [R, ...]: for each row, the values of its request."""
    return torch.index_select(values, 0, row_request)
