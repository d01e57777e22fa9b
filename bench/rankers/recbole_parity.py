"""Compare the parts of the published rankers with RecBole's, from the same weights, in a separate environment.

    python -m venv .venv-recbole && .venv-recbole/bin/pip install recbole torch

Usage, from the checkout: .venv-recbole/bin/python -m bench.rankers.recbole_parity. Prints JSON: the versions, and for
each part the largest absolute difference of the outputs.

RecBole's modules differ from the papers in three ways, which the comparison undoes:

- SequenceAttLayer divides DIN's weights by sqrt(D), and its Dice has neither mean and variance nor a learned slope. The
  layer is compared with ReLU, which our PReLU is with slope 0.
- TransformerEncoder adds the input and normalises after attention and after the pointwise layers, where SASRec
  normalises before them, and maps the attention's output once more. The map is set to the identity, and the sums and
  norms of a layer are made around our parts.
- The cross network of DCNV2 is that of the paper.
"""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace

import torch
from recbole.model.context_aware_recommender.dcnv2 import DCNV2
from recbole.model.layers import SequenceAttLayer, TransformerEncoder
from torch import Tensor, nn

from bench.rankers.dcn_v2 import FullRankCross
from bench.rankers.din import ActivationUnit
from bench.rankers.sasrec import CausalAttention, PointwiseForward

REQUESTS, LENGTH, DIM, LAYERS = 6, 9, 16, 2
TOLERANCE = 1e-5


def cross_difference() -> float:
    """Return the largest difference of two full-rank cross layers."""
    ours = FullRankCross(DIM, LAYERS)
    layers = [dict(layer.named_parameters()) for layer in ours.layers]
    theirs = SimpleNamespace(
        cross_layer_num=LAYERS,
        cross_layer_w=[layer["weight"] for layer in layers],
        bias=[layer["bias"].unsqueeze(1) for layer in layers],
    )
    inputs = torch.randn(REQUESTS, DIM)
    return _largest(ours(inputs), DCNV2.cross_network(theirs, inputs))


def attention_difference() -> float:
    """Return the largest difference of DIN's weighted sum of a user's actions."""
    hidden = 36
    ours = ActivationUnit(DIM, hidden)
    nn.init.zeros_(ours.slope)
    theirs = SequenceAttLayer(
        torch.arange(LENGTH), (4 * DIM, hidden), activation="relu", softmax_stag=False, return_seq_weight=False
    )
    theirs.att_mlp_layers.mlp_layers[1].load_state_dict(ours.hidden.state_dict())
    theirs.dense.load_state_dict(ours.out.state_dict())
    candidates, actions = torch.randn(REQUESTS, DIM), torch.randn(REQUESTS, LENGTH, DIM)
    counts = torch.arange(REQUESTS) % (LENGTH + 1)
    own = [actions[number, :count] for number, count in enumerate(counts.tolist())]
    pooled = [ours(candidate.unsqueeze(0), read) @ read for candidate, read in zip(candidates, own, strict=True)]
    return _largest(torch.stack(pooled), theirs(candidates, actions, counts) * DIM**0.5)


def encoder_difference() -> float:
    """Return the largest difference of SASRec's causal attention and pointwise layers, one after the other."""
    theirs = TransformerEncoder(
        n_layers=LAYERS, n_heads=1, hidden_size=DIM, inner_size=DIM, hidden_act="relu",
        hidden_dropout_prob=0.0, attn_dropout_prob=0.0,
    ).eval()  # fmt: skip
    counts = 1 + torch.arange(REQUESTS) % LENGTH
    present = torch.arange(LENGTH) < counts.unsqueeze(1)
    seen = torch.ones(LENGTH, LENGTH).tril().bool() & present.unsqueeze(1)
    states = inputs = torch.randn(REQUESTS, LENGTH, DIM)
    for layer in theirs.layer:
        attention, pointwise = CausalAttention(DIM), PointwiseForward(DIM)
        around = layer.multi_head_attention
        for name in ("query", "key", "value"):
            own = getattr(around, name)
            own.weight.data.copy_(getattr(attention, name).weight)
            own.bias.data.zero_()
        around.dense.weight.data.copy_(torch.eye(DIM))
        around.dense.bias.data.zero_()
        layer.feed_forward.dense_1.load_state_dict(pointwise.inner.state_dict())
        layer.feed_forward.dense_2.load_state_dict(pointwise.outer.state_dict())
        states = around.LayerNorm(attention(states, present) + states)
        states = layer.feed_forward.LayerNorm(pointwise(states) + states)
    mask = torch.where(seen, 0.0, -10_000.0).unsqueeze(1)
    last = theirs(inputs, mask, output_all_encoded_layers=False)[-1]
    return _largest(states[present], last[present])


def _largest(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise SystemExit(f"ours has the shape {tuple(ours.shape)}, RecBole's {tuple(theirs.shape)}")
    return float((ours - theirs).abs().max())


def main() -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        differences = {
            "DCN-v2, cross network": cross_difference(),
            "DIN, weighted sum of the actions": attention_difference(),
            "SASRec, attention and pointwise layers": encoder_difference(),
        }
    wrong = {part: found for part, found in differences.items() if not found <= TOLERANCE}
    if wrong:
        raise SystemExit(f"these parts differ from RecBole's by more than {TOLERANCE:g}: {wrong}")
    versions = {package: metadata.version(package) for package in ("recbole", "torch")}
    print(json.dumps({"versions": versions, "largest_differences": differences}))


if __name__ == "__main__":
    main()
