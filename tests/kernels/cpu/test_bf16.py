"""Products of bf16 numbers: native code equals NumPy to the bit, with the processor's instruction and without it."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kernels.bf16 import pairs, product, to_bf16
from kernels.encoder import instruction_sets
from kernels.native.library import library
from tests.bits import equal_to_the_bit

#: Rows that the kernel may read and write past the last one.
SLACK = 10
ANY_BITS = st.integers(0, 0xFFFF_FFFF)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw float32[M, K] and float32[K, N]: ordinary numbers, or any bits at all."""
    rows, depth, columns = draw(st.integers(1, 7)), 16 * draw(st.integers(1, 2)), 16 * draw(st.integers(1, 4))
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        scale = 10.0 ** draw(st.integers(-20, 18))
        left, right = (rng.normal(size=size) * scale for size in ((rows, depth), (depth, columns)))
        return left.astype(np.float32), right.astype(np.float32)
    left, right = (draw(arrays(np.uint32, size, elements=ANY_BITS)) for size in ((rows, depth), (depth, columns)))
    return left.view(np.float32), right.view(np.float32)


def native(isa: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    (rows, depth), columns = left.shape, right.shape[1]
    room, packed = np.zeros((rows + SLACK, depth // 2), np.int32), np.ascontiguousarray(pairs(right))
    padded, out = np.zeros((rows + SLACK, depth), np.float32), np.empty((rows + SLACK, columns), np.float32)
    padded[:rows] = left
    places = (ctypes.c_void_p(array.ctypes.data) for array in (padded, packed, room, out))
    library().pinrank_product_bf16(isa, *places, rows, columns, depth)
    assert equal_to_the_bit(room[:rows].view(np.uint16), to_bf16(left).astype(np.uint16))
    return out[:rows]


@pytest.mark.parametrize("isa", range(len(instruction_sets("bf16"))))
@given(given_matrices=matrices())
def test_native_products_equal_numpys_to_the_bit(isa: int, given_matrices) -> None:
    assert equal_to_the_bit(native(isa, *given_matrices), product(*given_matrices))


@pytest.mark.parametrize("isa", range(len(instruction_sets("bf16"))))
@pytest.mark.parametrize("bits", [0x7FFF_FFFF, 0xFFFF_FFFF, 0x7F80_0001])
def test_any_nan_makes_its_row_a_nan(isa: int, bits: int) -> None:
    left = np.ones((2, 16), np.float32)
    left[1, 3] = np.array(bits, np.uint32).view(np.float32)
    found = native(isa, left, np.ones((16, 16), np.float32))
    assert (found[0] == 16).all()
    assert np.isnan(found[1]).all()


@given(st.floats(width=32, allow_nan=False))
def test_a_number_is_rounded_to_the_nearest_of_eight_bits_and_ties_go_to_even(value: float) -> None:
    number = np.array(value, np.float32)
    if 0 < abs(value) < np.finfo(np.float32).tiny:
        assert int(to_bf16(number)) == (0x8000 if value < 0 else 0)
        return
    below = int(number.view(np.uint32)) >> 16
    low, high = (float(np.uint32(bits << 16).view(np.float32)) for bits in (below, below + 1))
    if not np.isfinite(high):  # the next one of the format would be 2 ** 128
        high = np.copysign(2.0**128, value)
    gaps = abs(value - low), abs(high - value)
    expected = below if gaps[0] < gaps[1] or (gaps[0] == gaps[1] and below % 2 == 0) else below + 1
    assert int(to_bf16(number)) == (below if np.isinf(value) else expected)


def test_what_is_not_a_number_stays_so() -> None:
    quiet, loud = np.array([0x7FC0_0000, 0x7F80_0001], np.uint32).view(np.float32)
    assert [int(to_bf16(nan)) for nan in (quiet, loud)] == [0x7FC0, 0x7FC0]


@given(st.integers(0, 1 << 32), st.integers(1, 40))
def test_a_product_differs_from_float64_by_no_more_than_its_rounding(seed: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(3, depth)).astype(np.float32), rng.normal(size=(depth, 5)).astype(np.float32)
    wide = left.astype(np.float64), right.astype(np.float64)
    exact, magnitude = wide[0] @ wide[1], np.abs(wide[0]) @ np.abs(wide[1])
    # Each operand is off by at most 2 ** -8 of itself, each of up to 2 * depth sums by 2 ** -24.
    bound = (2 * 2.0**-8 + 2.0**-16 + 2 * (depth + 1) * 2.0**-24) * magnitude
    assert (np.abs(product(left, right) - exact) <= bound).all()


def test_an_odd_row_is_paired_with_zeros() -> None:
    assert pairs(np.array([[1.0], [2.0], [3.0]], np.float32)).tolist() == [[0x4000_3F80], [0x4040]]
