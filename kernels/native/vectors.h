// Vectors of floats for one instruction set: how wide they are, how many registers hold them, and what is done with
// them. Each file that includes this is compiled once per instruction set, in a namespace of its own (see build.py).

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

// Tiles must become part of the loop around them: a call costs a tenth of a tile.
#define PINRANK_INLINE __attribute__((always_inline))

namespace PINRANK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int REGISTERS = 16;
#else
constexpr int WIDTH = 4;
constexpr int REGISTERS = 16;
#endif

// A lower score than the row's largest by more than this weighs nothing in float32.
constexpr float SPREAD_MAX = 40.0f;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Unaligned __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));
typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
template <int N>
inline PINRANK_INLINE void load_each(const float* from, Vector (&vectors)[N]) {
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) vectors[n] = load(from + n * WIDTH);
}
inline Four load_four(const float* from) { return *reinterpret_cast<const UnalignedFour*>(from); }
inline void store_four(float* to, Four value) { *reinterpret_cast<UnalignedFour*>(to) = value; }
inline Vector splat(float value) { return value - Vector{}; }  // x - 0 is x, which x + 0 is not for -0
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline int padded(int size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

// A vector's first four numbers over all of its lanes: again and again, or its first WIDTH / 4 numbers four times each.
template <int... I>
inline Vector repeated(Vector value, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(value, value, (I % 4)...);
}
inline Vector repeated(Vector value) { return repeated(value, std::make_integer_sequence<int, WIDTH>{}); }
template <int... I>
inline Vector spread(Vector value, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(value, value, (I / 4)...);
}
inline Vector spread(Vector value) { return spread(value, std::make_integer_sequence<int, WIDTH>{}); }

// Folds a vector into its first four lanes, by halves. A store and a loop would wait for the store each time.
template <typename Fold>
inline Four folded(Vector value, [[maybe_unused]] Fold fold) {
#if defined(__AVX512F__)
  const auto half = fold(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7),
                         __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
  return fold(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
#elif defined(__AVX__)
  return fold(__builtin_shufflevector(value, value, 0, 1, 2, 3), __builtin_shufflevector(value, value, 4, 5, 6, 7));
#else
  return value;
#endif
}

inline float sum(Vector value) {
  Four four = folded(value, [](auto a, auto b) { return a + b; });
  four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return four[0] + four[1];
}

inline float largest(Vector value) {
  const Four four = folded(value, [](auto a, auto b) { return a > b ? a : b; });
  return std::max(std::max((float)four[0], (float)four[1]), std::max((float)four[2], (float)four[3]));
}

// Lanes (of each four) of two vectors: [a0 b0 a1 b1] or [a2 b2 a3 b3]; and [a0 a1 b0 b1] or [a2 a3 b2 b3].
template <int UPPER, int... I>
inline Vector interleaved(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & ~3) + UPPER + (I & 3) / 2 + (I & 1) * WIDTH)...);
}
template <int UPPER, int... I>
inline Vector paired(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & ~3) + UPPER + (I & 1) + (I & 2) / 2 * WIDTH)...);
}

// The sums of four vectors, with a third of the shuffles of four times `sum`.
inline Four sum_of_each(Vector a, Vector b, Vector c, Vector d) {
  constexpr std::make_integer_sequence<int, WIDTH> lanes{};
  const Vector ab = interleaved<0>(a, b, lanes) + interleaved<2>(a, b, lanes);
  const Vector cd = interleaved<0>(c, d, lanes) + interleaved<2>(c, d, lanes);
  return folded(paired<0>(ab, cd, lanes) + paired<2>(ab, cd, lanes), [](auto x, auto y) { return x + y; });
}

template <int M>
inline void sum_of_each(const Vector (&values)[M], float* to) {
  int m = 0;
#pragma GCC unroll 4
  for (; m + 4 <= M; m += 4) store_four(to + m, sum_of_each(values[m], values[m + 1], values[m + 2], values[m + 3]));
#pragma GCC unroll 4
  for (; m < M; m++) to[m] = sum(values[m]);
}

// exp for arguments in [-87, 87]: 2^n times a polynomial of degree 6 on the remainder, error below 2 ulp.
inline Vector exponential(Vector x) {
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vector shifted = x * 1.44269504f + magic;
  Vector n = shifted - magic;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = splat(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * (Vector)power;
}

// Turn rows of scores into exp(score - the row's largest), and what lies beyond `length` into next to nothing.
inline void exponentiate(float* scores, int rows, int stride, int length) {
  const int end = padded(length), last = end - WIDTH;
  Integers lane;
  for (int i = 0; i < WIDTH; i++) lane[i] = last + i;
  const Integers inside = lane < length;
  for (int i = 0; i < rows; i++) {
    float* row = scores + (size_t)i * stride;
    Vector tops = inside ? load(row + last) : splat(-3e38f);
    store(row + last, tops);
    for (int c = 0; c < last; c += WIDTH) tops = larger(tops, load(row + c));
    const float top = largest(tops);
    for (int c = 0; c < end; c += WIDTH) store(row + c, exponential(larger(load(row + c) - top, splat(-SPREAD_MAX))));
  }
}

}  // namespace
}  // namespace PINRANK_ISA
