"""The Triton kernel of the early-fused encoder: one launch computes the readout of every row of a ragged batch.

Operators of the network (`kernels.gpu.encoder_node`) compute, once per request, what its rows share: tokens, and the
scores, values and keys of layer 1. Each program of the kernel takes a few rows of one request, and keeps all data of a
row on the chip: the attention, residual, norm and feed-forward of layer 1, then layer 2 for the positions that are
read. Operands of products are bf16; sums, norms and exponentials are fp32.

`ranker.network.serving_form.early_readout` is the plain reference; `kernels.encoder` the same on CPUs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from onnx import TensorProto, helper
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kernels.encoder import EncoderShape, check_weights, serves
from kernels.engine import EngineError
from kernels.gpu.tiles import Launch

#: Smallest sum of attention weights for which the product of exponentials is exact enough: what underflows in float32
#: is then less than 1e-12 of the sum. Below it, the kernel computes the softmax of the summed scores.
_SUM_MIN = tl.constexpr(1e-25)
_MASKED = tl.constexpr(-1e30)
#: Compiler options. Loads are not prefetched into shared memory: with Triton's default of 3 stages a program would need
#: more than there is.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
#: Triton's interpreter runs one kernel at a time.
_INTERPRETER = threading.Lock()
#: Longest supported sequence: a program holds its L x L matrix of scores.
LENGTH_MAX = 256
_BF16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
#: The kernel's products: the name in the kernel, the name of the weight, and the output and input sizes.
_PRODUCTS = (
    ("hidden1", "layer1_hidden", "H", "D"),
    ("out1", "layer1_feed_forward", "D", "H"),
    ("query_key2", "layer2_query_key", "D", "D"),
    ("value_out2", "layer2_value_out", "D", "D"),
    ("hidden2", "layer2_hidden", "H", "D"),
    ("out2", "layer2_feed_forward", "D", "H"),
)
_NORMS = ("layer1_norm_attention", "layer1_norm_out", "layer2_norm_attention", "layer2_norm_out")


@triton.jit
def _half(x, interpreted: tl.constexpr):
    """Round to the nearest bf16. Triton's interpreter truncates and has no bf16 products, so there it stays float32."""
    if interpreted:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _standardised(x, dim: tl.constexpr, epsilon: tl.constexpr):
    """Subtract each row's mean and divide by its standard deviation. Padding of x is 0; padding of the result is not.

    Mean and variance are computed in one pass. That is accurate because the inputs are sums with the output of a norm,
    whose mean is not much larger than their deviation.
    """
    mean = tl.sum(x, 1) / dim
    scale = tl.rsqrt(tl.maximum(tl.sum(x * x, 1) / dim - mean * mean, 0.0) + epsilon)
    return x * scale[:, None] - (mean * scale)[:, None]


@triton.jit
def _feed_forward(x, hidden, hidden_bias, out, interpreted: tl.constexpr):
    inner = tl.maximum(tl.dot(_half(x, interpreted), hidden) + hidden_bias[None, :], 0.0)
    return x + tl.dot(_half(inner, interpreted), out)


@triton.jit
def _first_layer(
    i, j, d, there, weight, weighted, added, constant,
    exponentials, scores, values, tokens, present, hidden, hidden_bias, out, norms,
    length: tl.constexpr, dim: tl.constexpr, epsilon: tl.constexpr, spare: tl.constexpr, interpreted: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the layer 1 outputs of the actions `i`, bf16[B, D], and whether each action exists."""
    square, wide = i[:, None] * L + j[None, :], i[:, None] * D + d[None, :]
    here = tl.load(present + i) > 0
    shared = _half(tl.load(exponentials + square), interpreted)
    mixed = tl.dot(shared, weighted)
    if spare:
        total = tl.sum(tl.where(d[None, :] == dim, mixed, 0.0), 1)
    else:
        total = tl.sum(shared.to(tl.float32) * weight[None, :], 1)
    if tl.min(tl.where(i < length, total, 1.0), 0) < _SUM_MIN:
        summed = tl.where(there[None, :], tl.load(scores + square) + added[None, :], _MASKED)
        spread = tl.exp(summed - tl.max(summed, 1)[:, None])
        value = _half(tl.load(values + j[:, None] * D + d[None, :]), interpreted)
        mixed = tl.dot(_half(spread, interpreted), value)
        total = tl.sum(spread, 1)
    share = 1.0 / tl.maximum(total, _SUM_MIN)
    x = tl.load(tokens + wide).to(tl.float32) + constant[None, :] + mixed * share[:, None]
    squares = tl.where(d[None, :] == dim, 0.0, x * x)  # without the column that holds the sums of the weights
    x *= tl.rsqrt(tl.sum(squares, 1) / dim + epsilon)[:, None]
    x = x * tl.load(norms + d)[None, :] + tl.load(norms + D + d)[None, :]
    x = _standardised(_feed_forward(x, hidden, hidden_bias, out, interpreted), dim, epsilon)
    return _half(x, interpreted), here


@triton.jit
def _candidate_side(
    row, j, d, c, e, there, keys, values, candidates, candidate_map, candidate_bias, row_of_candidate, row_bias,
    dim: tl.constexpr, embedding_dim: tl.constexpr, spare: tl.constexpr, interpreted: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Return what the candidate of a row adds to layer 1.

    The values are a constant for all tokens, float32[D], the score that it adds to each key and its exponential weight,
    float32[L], and the values times these weights, bf16[L, D].
    """
    pin = tl.load(candidates + row * embedding_dim + e, mask=e < embedding_dim, other=0.0)
    candidate = tl.sum(tl.load(candidate_map + c[:, None] * E + e[None, :]) * pin[None, :], 1)
    candidate += tl.load(candidate_bias + c)
    constant = tl.sum(tl.load(row_of_candidate + d[:, None] * C + c[None, :]) * candidate[None, :], 1)
    constant += tl.load(row_bias + d)

    key = tl.load(keys + j[:, None] * C + c[None, :])
    added = tl.where(there, tl.sum(key * candidate[None, :], 1), _MASKED)
    weight = tl.where(there, tl.exp(added - tl.max(added, 0)), 0.0)
    value = _half(tl.load(values + j[:, None] * D + d[None, :]), interpreted)
    if spare:
        value = tl.where(d[None, :] == dim, 1.0, value)
    weighted = _half(_half(weight, interpreted)[:, None] * value, interpreted)
    return constant, added, weight, weighted


@triton.jit
def _queries(x, d, newest, full, norms, query_key2, query_key2_bias, interpreted: tl.constexpr, D: tl.constexpr):
    """Return the rows of the newest actions, float32[K, D], and their queries of layer 2, bf16[K, D]."""
    asking = tl.dot(newest, x) * tl.load(norms + 2 * D + d)[None, :] + tl.load(norms + 3 * D + d)[None, :]
    mapped = tl.dot(_half(asking, interpreted), _half(tl.load(query_key2 + full), interpreted))
    return asking, _half(mapped + tl.load(query_key2_bias + d)[None, :], interpreted)


@triton.jit
def _after_attention(
    asking, read, d, h, full, to_hidden, from_hidden,
    value_out2, value_out2_bias, hidden2, hidden2_bias, out2, norms,
    dim: tl.constexpr, epsilon: tl.constexpr, interpreted: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the outputs of layer 2 for the rows that asked, float32[K, D], from what their attention read."""
    y = asking + tl.dot(_half(read, interpreted), _half(tl.load(value_out2 + full), interpreted))
    y += tl.load(value_out2_bias + d)[None, :]
    y = _standardised(y, dim, epsilon)
    y = y * tl.load(norms + 4 * D + d)[None, :] + tl.load(norms + 5 * D + d)[None, :]
    y = _feed_forward(
        y, _half(tl.load(hidden2 + to_hidden), interpreted), tl.load(hidden2_bias + h),
        _half(tl.load(out2 + from_hidden), interpreted), interpreted,
    )  # fmt: skip
    y = _standardised(y, dim, epsilon)
    return y * tl.load(norms + 6 * D + d)[None, :] + tl.load(norms + 7 * D + d)[None, :]


@triton.jit
def encode_rows(
    tiles, exponentials, scores, values, tokens, keys, present,
    candidates, candidate_map, candidate_bias, row_of_candidate, row_bias,
    hidden1, hidden1_bias, out1, query_key2, query_key2_bias, value_out2, value_out2_bias,
    hidden2, hidden2_bias, out2, norms, encoded,
    length: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr, embedding_dim: tl.constexpr, epsilon: tl.constexpr,
    spare: tl.constexpr, interpreted: tl.constexpr, L: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Encode the rows of a tile. Sizes in capitals are powers of two, at least 16; padding is 0.

    The actions of a row pass through layer 1 in blocks of B, the newest first, because those are the queries of layer
    2. Layer 2 reads each block as it is computed (online softmax: Milakov and Gimelshein, 2018). The outputs of a whole
    row would need more registers and shared memory than a program has.
    """
    tile = tl.program_id(0)
    request = tl.load(tiles + 3 * tile).to(tl.int64)
    start, stop = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    exponentials, scores = exponentials + request * L * L, scores + request * L * L
    values, tokens = values + request * L * D, tokens + request * L * D
    keys += request * L * C
    present += request * L
    j, d, c, e = tl.arange(0, L), tl.arange(0, D), tl.arange(0, C), tl.arange(0, E)
    h, k, i = tl.arange(0, H), tl.arange(0, K), tl.arange(0, B)
    there = tl.load(present + j) > 0
    to_hidden, from_hidden = d[:, None] * H + h[None, :], h[:, None] * D + d[None, :]
    full = d[:, None] * D + d[None, :]
    newest = _half((k[:, None] == i[None, :]).to(tl.float32), interpreted)
    reads = (k < rows) & (tl.load(present + tl.minimum(k, L - 1)) > 0)
    hidden, hidden_bias = _half(tl.load(hidden1 + to_hidden), interpreted), tl.load(hidden1_bias + h)
    out = _half(tl.load(out1 + from_hidden), interpreted)
    n = start
    while n < stop:
        row = tl.cast(n, tl.int64)
        constant, added, weight, weighted = _candidate_side(
            row, j, d, c, e, there, keys, values, candidates, candidate_map, candidate_bias, row_of_candidate, row_bias,
            dim, embedding_dim, spare, interpreted, D, C, E,
        )  # fmt: skip
        x, here = _first_layer(
            i, j, d, there, weight, weighted, added, constant,
            exponentials, scores, values, tokens, present, hidden, hidden_bias, out, norms,
            length, dim, epsilon, spare, interpreted, L, D,
        )  # fmt: skip
        asking, mapped = _queries(x, d, newest, full, norms, query_key2, query_key2_bias, interpreted, D)
        summed = tl.where(here[None, :], tl.dot(mapped, tl.trans(x)), _MASKED)
        highest = tl.max(summed, 1)
        spread = tl.exp(summed - highest[:, None])
        whole = tl.sum(spread, 1)
        read = tl.dot(_half(spread, interpreted), x)
        for first in range(B, L, B):
            x, here = _first_layer(
                first + i, j, d, there, weight, weighted, added, constant,
                exponentials, scores, values, tokens, present, hidden, hidden_bias, out, norms,
                length, dim, epsilon, spare, interpreted, L, D,
            )  # fmt: skip
            summed = tl.where(here[None, :], tl.dot(mapped, tl.trans(x)), _MASKED)
            higher = tl.maximum(highest, tl.max(summed, 1))
            spread = tl.exp(summed - higher[:, None])
            lowered = tl.exp(highest - higher)
            whole = whole * lowered + tl.sum(spread, 1)
            read = tl.dot(_half(spread, interpreted), x, read * lowered[:, None])
            highest = higher
        y = _after_attention(
            asking, read / whole[:, None], d, h, full, to_hidden, from_hidden,
            value_out2, value_out2_bias, hidden2, hidden2_bias, out2, norms, dim, epsilon, interpreted, D,
        )  # fmt: skip
        readout = encoded + row * rows * dim + k[:, None] * dim + d[None, :]
        tl.store(readout, tl.where(reads[:, None], y, 0.0), mask=(k[:, None] < rows) & (d[None, :] < dim))
        n += 1


class TritonEncoder:
    """The weights of one encoder in the kernel's layout. Immutable; may run on any number of streams."""

    def __init__(self, weights: Mapping[str, np.ndarray], shape: EncoderShape, launch: Launch | None = None) -> None:
        """Lay out the weights, named as in `ranker.network.serving_form.fold_early`.

        Raises EngineError if the kernel does not support the shape.
        """
        if not self.serves(shape):
            raise EngineError(f"the kernel supports two layers and up to {LENGTH_MAX} actions, not {shape}")
        check_weights(weights, shape)
        self.weights, self.shape = folded(weights), shape
        w = self.weights
        self.token_dim, self.candidate_dim = w["action_table"].shape[1] + len(w["acted"]), len(w["candidate"])
        self.dim = self.token_dim + self.candidate_dim
        self.width = shape.rows * self.dim
        real = (shape.length, self.dim, self.candidate_dim, w["acted"].shape[1], len(w["layer1_hidden"]), shape.rows)
        sizes = {name: max(16, int(triton.next_power_of_2(size))) for name, size in zip("LDCEHK", real, strict=True)}
        # Sizes above 128 x 128 need up to 208 KiB per program in blocks of 128, and 96 KiB in blocks of 32.
        launch = launch or (Launch() if sizes["L"] * sizes["D"] <= 128 * 128 else Launch(32, 4))
        sizes["B"] = min(sizes["L"], max(launch.block, sizes["K"]))
        self.constants: dict[str, Any] = {
            "length": shape.length,
            "dim": self.dim,
            "rows": shape.rows,
            "embedding_dim": w["acted"].shape[1],
            "epsilon": shape.epsilon,
            # Whether a padding column sums the attention weights within the product. In smaller blocks NVIDIA's
            # assembler handles the selection of that column badly: 32 registers, 17 KB spilled.
            "spare": self.dim < sizes["D"] and sizes["B"] > 32,
            "interpreted": isinstance(encode_rows, InterpretedFunction),
            **sizes,
        }
        #: The kernel's arguments from `candidate_map` to `norms`, by name.
        self.arrays = self._laid_out()
        #: Smaller blocks, of short sequences, keep the number of actions per warp.
        self.warps = max(min(4, launch.warps), launch.warps * sizes["B"] // max(sizes["B"], launch.block))

    @staticmethod
    def serves(shape: EncoderShape) -> bool:
        """Return whether the kernel supports an encoder of this shape."""
        return shape.layers == 2 and serves(shape) and shape.length <= LENGTH_MAX

    def _laid_out(self) -> dict[str, np.ndarray]:
        w, own, s = self.weights, self.token_dim, self.constants
        of_candidate = w["layer1_value_out"][:, own:].T.copy()
        of_candidate[:, own:] += np.eye(self.candidate_dim, dtype=np.float32)
        of_candidate -= of_candidate.mean(axis=1, keepdims=True)
        laid = {
            "candidate_map": _pad(w["candidate"], s["C"], s["E"]),
            "candidate_bias": _pad(w["candidate_bias"], s["C"]),
            "row_of_candidate": _pad(of_candidate.T, s["D"], s["C"]),
            "row_bias": _pad(w["layer1_value_out_bias"], s["D"]),
            "norms": np.stack([_pad(w[f"{name}{part}"], s["D"]) for name in _NORMS for part in ("", "_bias")]),
        }
        for name, held, *sizes in _PRODUCTS:
            out, into = (s[size] for size in sizes)
            laid[name] = _pad(w[held].T, into, out).astype(_BF16)
            if not held.endswith("feed_forward"):  # its bias is folded into others
                laid[f"{name}_bias"] = _pad(w[f"{held}_bias"], out)
        return laid

    def run(self, *given: Tensor, encoded: Tensor | None = None) -> Tensor:
        """Launch the kernel on its arguments from `tiles` to `norms`.

        Returns:
            float32[N, K * d], the concatenated outputs of the K newest actions, 0 for absent ones. Only rows in a tile
            are written.
        """
        tiles, candidates = given[0], given[encode_rows.arg_names.index("candidates")]
        if encoded is None:
            encoded = torch.empty((len(candidates), self.width), dtype=torch.float32, device=candidates.device)
        with _INTERPRETER if self.constants["interpreted"] else nullcontext():
            arrays = (*(tensor.contiguous() for tensor in given), encoded)
            encode_rows[(len(tiles),)](*arrays, **self.constants, num_warps=self.warps, **OPTIONS)
        return encoded


def folded(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return equivalent weights with which the kernel has less to compute for every action.

    The mean that each norm would subtract is removed from the products and biases before it (the request side removes
    that of layer 1's tokens). The gain and shift of layer 1's last norm are folded into the products of layer 2, the
    only readers of its output; a shift that all scores of a softmax share is dropped. The bias of a feed-forward is
    added to the shift before it, and subtracted from what the hidden units read.
    """
    w = {name: np.array(value, np.float64) for name, value in weights.items()}
    for name in ("value_out", "value_out_bias", "feed_forward", "feed_forward_bias"):
        for layer in ("layer1", "layer2"):
            w[f"{layer}_{name}"] -= w[f"{layer}_{name}"].mean(axis=0)
    gain, shift = w["layer1_norm_out"], w["layer1_norm_out_bias"]
    w["layer2_query_key"] *= gain[:, None]
    w["layer2_query_key_bias"] *= gain
    w["layer2_value_out_bias"] += w["layer2_value_out"] @ shift
    w["layer2_value_out"] *= gain
    for layer in ("layer1", "layer2"):
        bias = w[f"{layer}_feed_forward_bias"]
        w[f"{layer}_norm_attention_bias"] += bias
        w[f"{layer}_hidden_bias"] -= w[f"{layer}_hidden"] @ bias
    return {name: value.astype(np.float32) for name, value in w.items()}


def runs_on(device: torch.device) -> bool:
    """Return whether Triton kernels run on a device: on GPUs, and on CPUs in its interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or isinstance(encode_rows, InterpretedFunction)


def _pad(array: np.ndarray, *sizes: int) -> np.ndarray:
    return np.pad(array, [(0, size - held) for size, held in zip(sizes, array.shape, strict=True)])
