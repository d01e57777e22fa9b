"""Exact rewrites that make the published network cheap to serve, each a small function.

Nothing here is an approximation: every function equals the plain module of `ranker.network.encoder` up to rounding, and
is tested against it in float64. Per (user, candidate) row at the published size (L = 100, d = 96,
feed-forward 32, the newest 10 outputs read) the plain modules take 24.9 MFLOP, these functions 4.1.

Everything is differentiable and derives from the published parameters on the fly, so that training uses the cheap form
too. The weights in a bundle are folded once, at export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranker.network.encoder import Attention, CrossFusion, EarlyFusion, EncoderLayer, LateFusion, absent_bias, per_row

#: Folded weights by name; a Linear is `NAME` and `NAME_bias`.
Weights = Mapping[str, Tensor]

#: If both parts spread by at most this much, exp(a + b) may be computed as exp(a) exp(b): a product of two such
#: exponentials is a normal float32 number, so that neither a sum nor a gradient underflows.
SPREAD_MAX = 40.0


def fold_query_key(attention: Attention) -> tuple[Tensor, Tensor]:
    """Fold the query and key maps of a single head: a score is key_token . (W query_token + b).

    Returns:
        float[E, D] and float[E], for keys of width E and queries of width D, including the scale.
    """
    folded = attention.key.weight.T * attention.scale
    return folded @ attention.query.weight, folded @ attention.query.bias


def fold_value_out(attention: Attention) -> tuple[Tensor, Tensor]:
    """Fold the value and output maps of a single head: output = W (mean of attended tokens) + b, as weights sum to 1.

    Returns:
        float[D, E] and float[D].
    """
    weight = attention.out.weight @ attention.value.weight
    return weight, attention.out.weight @ attention.value.bias + attention.out.bias


def fold_layer(layer: EncoderLayer, prefix: str) -> dict[str, Tensor]:
    """Return the weights of an encoder layer with folded attention; every name starts with `prefix`."""
    query_key, value_out = fold_query_key(layer.attention), fold_value_out(layer.attention)
    inner, outer = layer.hidden, layer.feed_forward
    pairs = {
        "query_key": query_key,
        "value_out": value_out,
        "norm_attention": (layer.norm_attention.weight, layer.norm_attention.bias),
        "hidden": (inner.weight, inner.bias),
        "feed_forward": (outer.weight, outer.bias),
        "norm_out": (layer.norm_out.weight, layer.norm_out.bias),
    }
    named: dict[str, Tensor] = {}
    for name, (weight, bias) in pairs.items():
        named[f"{prefix}_{name}"], named[f"{prefix}_{name}_bias"] = weight, bias
    return named


def split_linear(linear: nn.Linear, widths: Sequence[int]) -> list[Tensor]:
    """Split a Linear over a concatenation into one weight per part: W [u; c] = W_u u + W_c c.

    This allows multiplying the request part once per request, whatever the number of candidates.
    """
    return list(torch.split(linear.weight, list(widths), dim=1))


def shared_scores(own: Tensor, present: Tensor, query_key: Tensor, bias: Tensor, rows: int) -> Tensor:
    """Compute the part of layer 1's scores that does not depend on the candidate, once per request.

    Args:
        own: float[R, L, T], tokens without the candidate.
        present: float[R, L].
        query_key: float[T, T], part of the folded map from own tokens to own tokens.
        bias: float[T], part of the folded bias for own tokens.
        rows: number of newest rows that act as queries.

    Returns:
        float[R, rows, L], lower by `MASKED` where no action is present.
    """
    scores = torch.matmul(functional.linear(own[:, :rows], query_key, bias), own.transpose(1, 2))
    return scores + absent_bias(present)


def candidate_scores(candidate: Tensor, candidate_keys: Tensor) -> Tensor:
    """Compute the candidate's part of layer 1's scores: float[N, L], from float[N, C] and float[N, L, C]."""
    return torch.matmul(candidate_keys, candidate.unsqueeze(-1)).squeeze(-1)


def shared_attention(shared: Tensor, added: Tensor, values: Tensor, present: Tensor, row_request: Tensor) -> Tensor:
    """Attend with scores that are the sum of a request part and a candidate part.

    exp(S_ij + b_j) = E_ij w_j, so there is one exponential per pair and request instead of one per pair and candidate.
    If the parts spread so far that the product would leave the range of float32, and in exported networks (plain
    operators cannot choose; the native kernel chooses row by row), it computes a softmax of the sum.

    Args:
        shared: float[R, Q, L] of `shared_scores`.
        added: float[N, L] of `candidate_scores`.
        values: float[R, L, D].
        present: float[R, L].
        row_request: int64[N].

    Returns:
        float[N, Q, D]; rows of requests without actions are meaningless.
    """
    value, there = per_row(values, row_request), per_row(present, row_request)
    if torch.compiler.is_exporting() or not _factors(shared, added, present, there):
        weights = torch.softmax(per_row(shared, row_request) + added.unsqueeze(1), dim=-1)
        return torch.matmul(weights, value)
    of_request = torch.exp(shared - shared.amax(dim=-1, keepdim=True)) * present.unsqueeze(1)
    below = added + absent_bias(there).squeeze(1)
    of_row = (torch.exp(below - below.amax(dim=-1, keepdim=True)) * there).unsqueeze(-1)
    every = per_row(of_request, row_request)
    total = torch.matmul(every, of_row)
    return torch.matmul(every, of_row * value) / total.clamp_min(torch.finfo(total.dtype).tiny)


def _factors(shared: Tensor, added: Tensor, present: Tensor, there: Tensor) -> bool:
    """Return whether every score is within `SPREAD_MAX` of the largest score of its part."""
    return all(
        bool(
            (
                torch.where(mask > 0, scores, -torch.inf).amax(-1) - torch.where(mask > 0, scores, torch.inf).amin(-1)
                <= SPREAD_MAX
            ).all()
        )
        for scores, mask in ((shared, present.unsqueeze(1)), (added, there))
    )


def encode_layer(queries: Tensor, tokens: Tensor, bias: Tensor, weights: Weights, prefix: str) -> Tensor:
    """Compute `EncoderLayer.forward` from folded weights, with half the products, for the query rows only."""
    mapped = _linear(queries, weights, f"{prefix}_query_key")
    attention = torch.softmax(torch.matmul(mapped, tokens.transpose(1, 2)) + bias, dim=-1)
    attended = _linear(torch.matmul(attention, tokens), weights, f"{prefix}_value_out")
    return encode_rows(queries + attended, weights, prefix)


def encode_rows(summed: Tensor, weights: Weights, prefix: str) -> Tensor:
    """Compute the rest of a layer after its attention, row by row: norm, feed-forward, norm."""
    normed = _norm(summed, weights, f"{prefix}_norm_attention")
    hidden = torch.relu(_linear(normed, weights, f"{prefix}_hidden"))
    return _norm(normed + _linear(hidden, weights, f"{prefix}_feed_forward"), weights, f"{prefix}_norm_out")


def fold_early(encoder: EarlyFusion) -> dict[str, Tensor]:
    """Return the weights for `early_readout`, derived from the published parameters."""
    weights = {
        "action_table": encoder.tokens.action.weight,
        "acted": encoder.tokens.pin.weight,
        "acted_bias": encoder.tokens.pin.bias,
        "candidate": encoder.candidate.weight,
        "candidate_bias": encoder.candidate.bias,
    }
    for number, layer in enumerate(encoder.layers, start=1):
        weights |= fold_layer(layer, f"layer{number}")  # type: ignore[arg-type]
    return weights


def early_readout(
    weights: Weights,
    actions: Tensor,
    embeddings: Tensor,
    pin_embedding: Tensor,
    row_request: Tensor,
    *,
    layers: int,
    rows: int,
    pooled: bool = False,
) -> Tensor:
    """Compute the outputs of an `EarlyFusion` that its readout reads: float[N, `rows`, D], zeros for absent actions.

    With `pooled`, all L rows are returned, because a max-pool requires every output.
    """
    own = torch.cat([weights["action_table"][actions], _linear(embeddings, weights, "acted")], dim=-1)
    present = (actions != 0).to(own.dtype)
    length = own.shape[1]
    read = length if pooled else rows
    first = length if layers > 1 else read
    candidate = _linear(pin_embedding, weights, "candidate")

    # Layer 1: own tokens and candidate are two parts of every map; the request part is computed once.
    width = own.shape[-1]
    query_key, query_key_bias = weights["layer1_query_key"], weights["layer1_query_key_bias"][:width]
    value_out = weights["layer1_value_out"]
    shared = shared_scores(own, present, query_key[:width, :width], query_key_bias, first)
    candidate_keys = torch.matmul(own, query_key[:width, width:])
    values = torch.matmul(own, value_out[:, :width].T)
    present_row = per_row(present, row_request)
    added = candidate_scores(candidate, per_row(candidate_keys, row_request))
    attended = shared_attention(shared, added, values, present, row_request)
    constant = functional.linear(candidate, value_out[:, width:], weights["layer1_value_out_bias"])
    spread = candidate.unsqueeze(1).expand(-1, first, -1)
    tokens = torch.cat([per_row(own[:, :first], row_request), spread], dim=-1)
    tokens = encode_rows(tokens + attended + constant.unsqueeze(1), weights, "layer1")

    bias = absent_bias(present_row)
    for number in range(2, layers + 1):
        asking = tokens[:, :read] if number == layers else tokens
        tokens = encode_layer(asking, tokens, bias, weights, f"layer{number}")
    return tokens * present_row[:, :read].unsqueeze(-1)


def encode_early(encoder: EarlyFusion, *inputs: Tensor) -> Tensor:
    """Compute `EarlyFusion.forward` in its serving form."""
    readout = encoder.readout
    pooled = readout.pooled is not None
    outputs = early_readout(fold_early(encoder), *inputs, layers=len(encoder.layers), rows=readout.rows, pooled=pooled)
    return read_out(outputs, encoder)


def read_out(outputs: Tensor, encoder: EarlyFusion) -> Tensor:
    """Concatenate the outputs of `early_readout` as `Readout` does."""
    newest = outputs[:, : encoder.readout.rows].flatten(1)
    if encoder.readout.pooled is None:
        return newest
    return torch.cat([newest, encoder.readout.pooled(outputs.amax(dim=1))], dim=-1)


def encode_late(encoder: LateFusion, actions: Tensor, embeddings: Tensor, *_: Tensor) -> Tensor:
    """Compute `LateFusion.forward` with folded maps and, in the last layer, only the rows that the readout takes."""
    tokens, present = encoder.tokens(actions, embeddings)
    bias = absent_bias(present)
    for number, layer in enumerate(encoder.layers, start=1):
        last = number == len(encoder.layers) and encoder.readout.pooled is None
        asking = tokens[:, : encoder.readout.rows] if last else tokens
        tokens = encode_layer(asking, tokens, bias, fold_layer(layer, "layer"), "layer")  # type: ignore[arg-type]
    read: Tensor = encoder.readout(tokens, present[:, : tokens.shape[1]])
    return read


def encode_cross(
    encoder: CrossFusion, actions: Tensor, embeddings: Tensor, pin_embedding: Tensor, row_request: Tensor
) -> Tensor:
    """Compute `CrossFusion.forward` with keys and values mapped once per request, and only attention per row."""
    tokens, present = encoder.tokens(actions, embeddings)
    bias = absent_bias(present)
    for layer in encoder.layers:
        tokens = encode_layer(tokens, tokens, bias, fold_layer(layer, "layer"), "layer")  # type: ignore[arg-type]
    last = fold_layer(encoder.last, "last")
    query = encoder.candidate(pin_embedding)
    keys = torch.matmul(tokens, last["last_query_key"])
    # The bias of the folded map also meets every key: one number per key and request.
    offset = torch.matmul(tokens, last["last_query_key_bias"]) + bias.squeeze(1)
    values = torch.matmul(tokens, last["last_value_out"].T)
    scores = torch.matmul(per_row(keys, row_request), query.unsqueeze(-1)).squeeze(-1) + per_row(offset, row_request)
    attention = torch.softmax(scores, dim=-1)
    attended = torch.matmul(attention.unsqueeze(1), per_row(values, row_request)).squeeze(1)
    read = encode_rows(query + attended + last["last_value_out_bias"], last, "last")
    return read * per_row(present[:, :1], row_request)


def _linear(inputs: Tensor, weights: Weights, name: str) -> Tensor:
    return functional.linear(inputs, weights[name], weights[f"{name}_bias"])


def _norm(inputs: Tensor, weights: Weights, name: str) -> Tensor:
    return functional.layer_norm(inputs, inputs.shape[-1:], weights[name], weights[f"{name}_bias"])
