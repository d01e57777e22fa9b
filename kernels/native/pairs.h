// Pairs of bf16 numbers: what is made of floats, and how two pairs are multiplied.
//
// A bf16 number is the upper half of a float, rounded to nearest, ties to even; denormal numbers become zero. A lane of
// 32 bits holds the numbers 2k (lower half) and 2k + 1 of a row, and one instruction multiplies both with those of
// another lane and adds them to a float, the odd ones first, each with a rounding of its own. Where the processor lacks
// it, the same is computed in steps, equal to the bit. kernels/bf16.py says the same in NumPy.

#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace PINRANK_ISA {
namespace {

struct Pair {
  int32_t bits;
};

// How many numbers of a row stand in 32 bits.
template <typename Number>
constexpr int PER = 1;
template <>
constexpr int PER<Pair> = 2;

typedef int32_t UnalignedIntegers __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int16_t Halves __attribute__((vector_size(WIDTH * 2)));
typedef int16_t UnalignedHalves __attribute__((vector_size(WIDTH * 2), aligned(4), may_alias));

inline Integers load(const Pair* from) { return *reinterpret_cast<const UnalignedIntegers*>(from); }
inline void store(Pair* to, Integers value) { *reinterpret_cast<UnalignedIntegers*>(to) = value; }
template <int N>
inline PINRANK_INLINE void load_each(const Pair* from, Integers (&vectors)[N]) {
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) vectors[n] = load(from + n * WIDTH);
}
inline Integers splat(Pair pair) { return pair.bits - Integers{}; }

inline Vector multiply_add(Vector a, Vector b, Vector sum) { return sum + a * b; }

// The even or the odd sets of four lanes of two vectors.
template <int ODD, int... I>
inline Vector every_other_four(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 8 + ODD * 4 + I % 4)...);
}

#if defined(__AVX512BF16__)

inline Vector multiply_add(Integers a, Integers b, Vector sum) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Lane i is the pair of lane i of both.
inline Integers zipped(Vector even, Vector odd) {
  typedef int16_t Words __attribute__((vector_size(64)));
  const Words both = (Words)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Integers)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                           25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

inline Halves halves(Vector value) { return (Halves)_mm512_cvtneps_pbh((__m512)value); }

#else

typedef double Doubles __attribute__((vector_size(WIDTH * 8)));

// Denormal numbers count as zeros with their sign.
inline Vector flushed(Vector value) {
  const Integers bits = (Integers)value;
  return (Vector)((bits & 0x7f800000) == 0 ? bits & INT32_MIN : bits);
}

// A product of two bf16 numbers is exact in double precision, and its sum with a float close enough to round as if it
// were.
inline Vector fused(Integers a, Integers b, Vector sum) {
  const Doubles product = __builtin_convertvector(flushed((Vector)a), Doubles) *
                          __builtin_convertvector(flushed((Vector)b), Doubles);
  return flushed(__builtin_convertvector(product + __builtin_convertvector(sum, Doubles), Vector));
}

inline Vector multiply_add(Integers a, Integers b, Vector sum) {
  constexpr int32_t ODD = -65536;  // the upper half
  return fused(a << 16, b << 16, fused(a & ODD, b & ODD, flushed(sum)));
}

typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));

// The bits of a bf16 number, in the lower half.
inline Integers rounded(Vector value) {
  const Bits bits = (Bits)flushed(value);  // unsigned, as the largest NaNs overflow here
  const Bits near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  return value == value ? (Integers)near : (Integers)quiet;
}

inline Integers zipped(Vector even, Vector odd) { return rounded(even) | rounded(odd) << 16; }
inline Halves halves(Vector value) { return __builtin_convertvector(rounded(value), Halves); }

#endif

// Stores WIDTH numbers of a row as WIDTH / 2 pairs.
inline void store_row(Pair* to, Vector value) { *reinterpret_cast<UnalignedHalves*>(to) = halves(value); }
inline void store_row(float* to, Vector value) { store(to, value); }

// Pairs of numbers that stand four lanes apart, for rows of four candidates that alternate from lane to lane.
inline Integers zipped_fours(Vector a, Vector b) {
  constexpr std::make_integer_sequence<int, WIDTH> lanes{};
  return zipped(every_other_four<0>(a, b, lanes), every_other_four<1>(a, b, lanes));
}

// Turns rows of floats into pairs, or leaves floats as they are.
inline const Pair* row_pairs(const float* from, size_t count, Pair* to) {
  for (size_t c = 0; c < count; c += WIDTH) store_row(to + c / 2, load(from + c));
  return to;
}
inline const float* row_pairs(const float* from, size_t, float*) { return from; }

}  // namespace
}  // namespace PINRANK_ISA
