"""The logistic function of float32 logits, equal to the bit in NumPy and C++ and on every processor.

NumPy's float32 exponential differs between processors by its vector width, so this one consists of plain operations
only: x = k ln 2 + r with |r| <= ln(2)/2, and exp(x) = 2^k exp(r). The split of ln 2 into two floats is that of Cody and
Waite (Software Manual for the Elementary Functions, 1980): the product of k and the larger one is exact. exp(r) is
1 + r + r^2 q(r), where q is the polynomial of degree 4 with the smallest largest relative error of exp(r), 3.1e-9
(Lawson's algorithm). For |x| <= 80 the result is within 1 unit in the last place.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from kernels.native.library import library_if_built

# `exp_of` in kernels/native/answer.cpp uses the same numbers.
_ONE, _BOUND = np.float32(1), np.float32(80)
_HALVINGS_PER_UNIT, _LN_2_HIGH, _LN_2_LOW = np.float32(1.44269502), np.float32(0.693359375), np.float32(-2.12194442e-4)
_Q = tuple(np.float32(c) for c in (1.38145406e-3, 8.36874545e-3, 4.1668389e-2, 1.66665211e-1, 4.9999994e-1))
#: 1.5 * 2^23: the last bits of a small number plus this one hold the nearest integer.
_ROUNDING = np.float32(12_582_912)
#: So many numbers of a pattern fill several vectors of any width.
_PATTERN = 64


class Logistic:
    """Computes sigmoid(slope * logit + intercept) for each head. May be used by several threads at once.

    Attributes:
        slopes: float32[K * H], each head's slope, K times over.
        intercepts: float32[K * H].
    """

    def __init__(self, slopes: np.ndarray, intercepts: np.ndarray) -> None:
        """Take each head's slope and intercept, float32[H] each."""
        self._heads = len(slopes)
        times = -(-_PATTERN // len(slopes))
        self.slopes, self.intercepts = np.tile(slopes, times), np.tile(intercepts, times)
        self._native = _native()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities, float32[N, H], of float32[N, H]. A logit that is not finite gives NaN."""
        if self._native is None:
            return self.reference(logits)
        logits = np.ascontiguousarray(logits, np.float32)
        probabilities = np.empty_like(logits)
        self._native(
            logits.ctypes.data,
            logits.size,
            self.slopes.ctypes.data,
            self.intercepts.ctypes.data,
            len(self.slopes),
            probabilities.ctypes.data,
        )
        return probabilities

    def reference(self, logits: np.ndarray) -> np.ndarray:
        """Do the same in NumPy."""
        slopes, intercepts = self.slopes[: self._heads], self.intercepts[: self._heads]
        with np.errstate(all="ignore"):  # a logit that overflows is at a bound
            scaled = -(slopes * logits + intercepts)
        # Within these bounds exp stays finite. A non-finite logit is an engine fault and must stay visible.
        scaled = np.minimum(np.maximum(scaled, -_BOUND), _BOUND)
        probabilities: np.ndarray = _ONE / (exp(scaled) + _ONE)
        probabilities[~np.isfinite(logits)] = np.nan
        return probabilities


def exp(x: np.ndarray) -> np.ndarray:
    """Return the exponential, float32, of float32 numbers between -80 and 80."""
    shifted = x * _HALVINGS_PER_UNIT + _ROUNDING
    halvings = shifted - _ROUNDING
    rest = (x - halvings * _LN_2_HIGH) - halvings * _LN_2_LOW
    total = _Q[0] * rest + _Q[1]
    for coefficient in _Q[2:]:
        total = total * rest + coefficient
    total = total * (rest * rest) + rest + _ONE
    scale = (shifted.view(np.uint32) << np.uint32(23)) + np.uint32(0x3F800000)
    result: np.ndarray = total * scale.view(np.float32)
    return result


@cache
def _native() -> Any:
    loaded = library_if_built()
    if loaded is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.pinrank_calibrate.argtypes = [pointer, integer, pointer, pointer, integer, pointer]
    loaded.pinrank_calibrate.restype = None
    return loaded.pinrank_calibrate
