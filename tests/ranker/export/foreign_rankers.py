"""Rankers as people write them in PyTorch, without a thought of how their sizes are computed.

Each reads `sequence` (float32[R, L, D]), `actions` (int64[R, L], 0 where there is none), `user` (float32[R, D]), `pin`
(float32[N, D]) and `row_request` (int64[N]), and returns float32[N, H].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH, DIM, HEADS = 6, 8, 3
Ranked = Callable[["Ranker", Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Ranker(nn.Module):
    """All layers that one of the rankers needs, and the ranker itself as a function of these and the inputs."""

    def __init__(self, ranked: Ranked) -> None:
        super().__init__()
        self.ranked = ranked
        layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True)
        self.sequence_first = nn.TransformerEncoderLayer(DIM, 2, 16)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.gru, self.lstm = nn.GRU(DIM, DIM, batch_first=True), nn.LSTM(DIM, DIM, batch_first=True)
        self.both_ways = nn.GRU(DIM, DIM // 2, num_layers=2, bidirectional=True)
        self.kinds, self.bag = nn.Embedding(5, DIM, padding_idx=0), nn.Embedding(5, DIM)
        self.convolution = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.cross = nn.ModuleList(nn.Linear(2 * DIM, 2 * DIM) for _ in range(2))
        self.normal, self.by_batch = nn.LayerNorm(DIM), nn.BatchNorm1d(DIM)
        self.unit = nn.Sequential(nn.Linear(4 * DIM, 16), nn.PReLU(), nn.Linear(16, 1))
        self.experts = nn.Parameter(torch.randn(4, DIM, DIM))
        self.gate = nn.Linear(DIM, 4)
        self.narrow, self.middle = nn.Linear(DIM, HEADS), nn.Linear(2 * DIM, HEADS)
        self.wide = nn.Linear(LENGTH * DIM, HEADS)

    def forward(self, sequence: Tensor, actions: Tensor, user: Tensor, pin: Tensor, row_request: Tensor) -> Tensor:
        """Return float32[N, H]."""
        return self.ranked(self, sequence, actions, user, pin, row_request)


def encoder_layer(m, sequence, actions, user, pin, row):
    return m.narrow(m.layer(sequence)[row].mean(1) * pin)


def encoder_with_padding(m, sequence, actions, user, pin, row):
    encoded = m.encoder(sequence, src_key_padding_mask=actions == 0)
    return m.wide((encoded[row] * pin.unsqueeze(1)).flatten(1))


def encoder_causal(m, sequence, actions, user, pin, row):
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    return m.narrow(m.encoder(sequence, mask=mask, is_causal=True)[:, -1][row] * pin)


def encoder_sequence_first(m, sequence, actions, user, pin, row):
    encoded = m.sequence_first(sequence.transpose(0, 1), src_key_padding_mask=actions == 0)
    return m.narrow(encoded.mean(0).index_select(0, row) * pin)


def encoder_of_candidates(m, sequence, actions, user, pin, row):
    joined = torch.cat([pin.unsqueeze(1), sequence[row]], dim=1)
    return m.narrow(m.layer(joined)[:, 0])


def multihead_attention(m, sequence, actions, user, pin, row):
    of_rows, padding = sequence[row], (actions == 0)[row]
    found, _ = m.attention(pin.unsqueeze(1), of_rows, of_rows, key_padding_mask=padding)
    return m.narrow(found.squeeze(1))


def attention_without_weights(m, sequence, actions, user, pin, row):
    found, _ = m.attention(sequence, sequence, sequence, need_weights=False)
    return m.narrow(found.sum(1)[row] + pin)


def scaled_dot_product(m, sequence, actions, user, pin, row):
    heads = sequence.view(sequence.size(0), LENGTH, 2, DIM // 2).transpose(1, 2)
    mask = (actions != 0)[:, None, None, :]
    found = functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    return m.wide(found.transpose(1, 2).reshape(sequence.shape[0], -1)[row]) + m.narrow(pin)


def reshape_to_shape(m, sequence, actions, user, pin, row):
    return m.wide(sequence.reshape(sequence.shape[0], -1))[row] + m.narrow(pin)


def view_with_a_constant(m, sequence, actions, user, pin, row):
    return m.wide((sequence[row] * pin[:, None]).view(-1, LENGTH * DIM))


def view_of_rows_and_places(m, sequence, actions, user, pin, row):
    joined = sequence[row] * pin[:, None]
    rows, length, dim = joined.shape
    return m.narrow(m.by_batch(joined.reshape(rows * length, dim)).view(rows, length, dim).mean(1))


def unflatten_and_permute(m, sequence, actions, user, pin, row):
    heads = sequence.unflatten(-1, (2, DIM // 2)).permute(0, 2, 1, 3).contiguous()
    return m.wide(heads.flatten(1, 3)[row]) + m.narrow(pin)


def expand_to_places(m, sequence, actions, user, pin, row):
    wide = pin.unsqueeze(1).expand(-1, LENGTH, -1)
    return m.middle(torch.cat([sequence[row], wide], dim=-1).sum(1))


def expand_as_places(m, sequence, actions, user, pin, row):
    of_rows = sequence[row]
    return m.narrow((pin.unsqueeze(1).expand_as(of_rows) - of_rows).square().sum(1))


def expand_to_shape(m, sequence, actions, user, pin, row):
    bias = m.kinds.weight[1].expand(pin.shape[0], pin.shape[1])
    return m.narrow(user[row] + bias + pin)


def repeat_places(m, sequence, actions, user, pin, row):
    return m.wide(pin.unsqueeze(1).repeat(1, LENGTH, 1).flatten(1) * sequence[row].flatten(1))


def repeat_to_batch(m, sequence, actions, user, pin, row):
    return m.narrow(m.kinds.weight[:1].repeat(pin.size(0), 1) * pin + user[row])


def repeat_interleaved(m, sequence, actions, user, pin, row):
    return m.narrow(pin.repeat_interleave(2, dim=1).view(pin.shape[0], 2, DIM).sum(1) + user[row])


def zeros_and_ones_like(m, sequence, actions, user, pin, row):
    start = torch.zeros(pin.shape[0], 1, DIM)
    return m.narrow(torch.cat([start, sequence[row]], 1).mean(1) + torch.ones_like(pin) + pin.new_zeros(pin.shape))


def einsum_of_all(m, sequence, actions, user, pin, row):
    return m.narrow(torch.einsum("nld,nd,de->ne", sequence[row], pin, m.experts[0]))


def cat_stack_split_chunk(m, sequence, actions, user, pin, row):
    first, second = torch.stack([user[row], pin], dim=1).flatten(1).chunk(2, dim=-1)
    third, fourth = torch.split(torch.cat([first, second], dim=-1), [DIM, DIM], dim=1)
    fifth, sixth = pin.unbind(1)[:2]
    return m.narrow(third * fourth + (fifth - sixth).unsqueeze(-1))


def embedding_and_mean(m, sequence, actions, user, pin, row):
    mask = (actions > 0).float().unsqueeze(-1)
    mean = (m.kinds(actions) * mask).sum(1) / mask.sum(1).clamp(min=1)
    return m.narrow(mean.index_select(0, row) * pin)


def masked_softmax_pooling(m, sequence, actions, user, pin, row):
    of_rows, present = sequence[row], (actions > 0)[row]
    scores = (of_rows @ pin.unsqueeze(-1)).squeeze(-1).masked_fill(~present, float("-inf"))
    shares = scores.softmax(-1).nan_to_num(0.0)
    return m.narrow(torch.bmm(shares.unsqueeze(1), of_rows).squeeze(1) * pin)


def target_attention(m, sequence, actions, user, pin, row):  # DIN
    of_rows = sequence[row]
    wide = pin.unsqueeze(1).expand(-1, of_rows.size(1), -1)
    weights = m.unit(torch.cat([wide, of_rows, wide - of_rows, wide * of_rows], dim=-1)).transpose(1, 2)
    weights = weights * (actions[row] > 0).unsqueeze(1)
    return m.middle(torch.cat([torch.matmul(weights, of_rows).squeeze(1), pin], dim=-1))


def cross_layers(m, sequence, actions, user, pin, row):  # DCN-v2
    first = crossed = torch.cat([user[row], pin], dim=-1)
    for layer in m.cross:
        crossed = first * layer(crossed) + crossed
    return m.middle(crossed)


def factorisation_machine(m, sequence, actions, user, pin, row):  # DeepFM, DLRM
    fields = torch.stack([user[row], pin, sequence.mean(1)[row]], dim=1)
    pairs = torch.bmm(fields, fields.transpose(1, 2))
    left, right = torch.triu_indices(3, 3, offset=1)
    second = 0.5 * (fields.sum(1).square() - fields.square().sum(1))
    return m.narrow(second) + pairs[:, left, right]


def mixture_of_experts(m, sequence, actions, user, pin, row):  # MMoE
    joined = user[row] + pin
    made = torch.einsum("nd,kde->nke", joined, m.experts)
    return m.narrow((m.gate(joined).softmax(-1).unsqueeze(-1) * made).sum(1))


def layer_norm(m, sequence, actions, user, pin, row):
    return m.narrow(m.normal(user[row] + pin) + functional.normalize(pin, dim=-1))


def convolution(m, sequence, actions, user, pin, row):  # Caser
    found = functional.relu(m.convolution(sequence.transpose(1, 2)))
    return m.narrow(functional.max_pool1d(found, LENGTH).squeeze(-1)[row] * pin)


def gru(m, sequence, actions, user, pin, row):
    _, last = m.gru(sequence)
    return m.narrow(last[-1][row] * pin)


def gru_both_ways(m, sequence, actions, user, pin, row):
    states, _ = m.both_ways(sequence.transpose(0, 1))
    return m.narrow(states[-1][row] * pin)


def lstm(m, sequence, actions, user, pin, row):
    states, _ = m.lstm(sequence)
    return m.narrow(states[:, -1, :][row] * pin)


def positions(m, sequence, actions, user, pin, row):
    places = torch.arange(actions.size(1)).unsqueeze(0).expand(actions.size(0), -1)
    return m.narrow((sequence + m.bag(places.clamp(max=4))).sum(1)[row] * pin)


def newest_action(m, sequence, actions, user, pin, row):
    last = ((actions > 0).sum(1) - 1).clamp(min=0)
    newest = sequence[torch.arange(sequence.shape[0]), last]
    gathered = sequence.gather(1, last.view(-1, 1, 1).expand(-1, 1, DIM))[:, 0]
    return m.narrow((newest + gathered)[row] * pin)


def best_actions(m, sequence, actions, user, pin, row):
    scores = torch.einsum("nld,nd->nl", sequence[row], pin)
    found = scores.topk(3, dim=1)
    chosen = torch.gather(sequence[row], 1, found.indices.unsqueeze(-1).expand(-1, -1, DIM))
    return m.narrow((chosen * found.values.unsqueeze(-1)).sum(1))


def slices_and_flips(m, sequence, actions, user, pin, row):
    recent = torch.cat([sequence[:, -3:], sequence.flip(1)[:, :3]], dim=1)
    return m.wide(recent[row].flatten(start_dim=1)) + m.narrow(pin[:, :] + functional.pad(pin[:, 1:], (1, 0)))


RANKERS: Mapping[str, Ranked] = {
    ranked.__name__: ranked
    for ranked in (
        *(encoder_layer, encoder_with_padding, encoder_causal, encoder_sequence_first, encoder_of_candidates),
        *(multihead_attention, attention_without_weights, scaled_dot_product),
        *(reshape_to_shape, view_with_a_constant, view_of_rows_and_places, unflatten_and_permute),
        *(expand_to_places, expand_as_places, expand_to_shape, repeat_places, repeat_to_batch, repeat_interleaved),
        *(zeros_and_ones_like, einsum_of_all, cat_stack_split_chunk, embedding_and_mean, masked_softmax_pooling),
        *(target_attention, cross_layers, factorisation_machine, mixture_of_experts, layer_norm, convolution),
        *(gru, gru_both_ways, lstm, positions, newest_action, best_actions, slices_and_flips),
    )
}
