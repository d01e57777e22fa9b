"""The arithmetic of bf16 products, in NumPy: the reference of `kernels/native/pairs.h`, and what packs its weights.

A bf16 number is the upper half of a float32. Processors with AVX512_BF16 multiply two pairs of them in one instruction
and add both products to a float32: the odd numbers' first, then the even ones', each with one rounding to nearest, ties
to even. Denormal numbers count as zeros, as inputs, sums and results. The native code, on processors with and without
the instruction, equals this to the bit.
"""

from __future__ import annotations

import numpy as np

_EXPONENT, _SIGN, _UPPER = np.uint32(0x7F80_0000), np.uint32(0x8000_0000), np.uint32(0xFFFF_0000)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 numbers to bf16. Returns their 16 bits as uint32, of the same shape."""
    bits = _flushed(values).view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    rounded: np.ndarray = np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), near)
    return rounded


def pairs(matrix: np.ndarray) -> np.ndarray:
    """Return float32[K, N] as uint32[ceil(K / 2), N]: rows 2k in the lower halves, rows 2k + 1 in the upper ones."""
    halves = to_bf16(np.pad(matrix, ((0, len(matrix) % 2), (0, 0))))
    packed: np.ndarray = halves[::2] | (halves[1::2] << 16)
    return packed


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply float32[M, K] and float32[K, N] as the instruction does, pair by pair. Returns float32[M, N]."""
    sums = np.zeros((len(left), right.shape[1]), np.float32)
    for column, row in zip(pairs(left.T)[:, :, None], pairs(right)[:, None, :], strict=True):
        sums = _added(sums, column & _UPPER, row & _UPPER)
        sums = _added(sums, column << 16, row << 16)
    return sums


def _added(sums: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return sums + a * b with one rounding. A product of two numbers of 8 bits is exact in float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        exact = _flushed(a.view(np.float32)).astype(np.float64) * _flushed(b.view(np.float32)).astype(np.float64)
        return _flushed((sums.astype(np.float64) + exact).astype(np.float32))


def _flushed(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers with zeros, of the same sign, for denormal ones."""
    bits = values.view(np.uint32)
    return np.where(bits & _EXPONENT, bits, bits & _SIGN).view(np.float32)
