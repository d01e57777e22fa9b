// Products of small matrices, with sums that stay in registers.
//
// A tile is M rows times N vectors of sums. Each step of its depth loads N vectors of the right matrix and M numbers of
// the left one for M * N multiply-adds. Tiles are chosen so that the sums and what they are made of fit the registers,
// and that there are enough of them to keep two multipliers busy that answer after four or five cycles.

#pragma once

#include "pairs.h"
#include "vectors.h"

namespace PINRANK_ISA {
namespace {

// Fifteen sums of 32 registers, which leaves some for what a tile ends with, or twelve of 16.
constexpr int ROWS = REGISTERS == 32 ? 5 : 4, COLUMNS = 3;
// Blocks may read and write this many rows past the last one.
constexpr int SLACK = 2 * ROWS;

// sums[m][n] += sum over k of left[m][k] * right[k][n]: the loop that all products consist of. The numbers of a row of
// `left` stand STEP apart. A number is a float, or a pair of bf16 numbers: then `depth` counts pairs.
template <int STEP, typename Number, int M, int N>
inline PINRANK_INLINE void accumulate(const Number* left, int left_stride, const Number* right, int right_stride,
                                      int depth, Vector (&sums)[M][N]) {
#pragma GCC unroll 4
  for (int k = 0; k < depth; k++) {
    decltype(load(right)) row[N];
    load_each(right + (size_t)k * right_stride, row);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const auto factor = splat(left[(size_t)m * left_stride + k * STEP]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[m][n] = multiply_add(factor, row[n], sums[m][n]);
    }
  }
}

// Calls step.operator()<N>(first column) for `columns` vectors of WIDTH: COLUMNS at a time, and no lonely one if there
// is another way.
template <typename Step>
inline PINRANK_INLINE void over_columns(int columns, Step&& step) {
  int v = 0;
  for (; columns - v >= COLUMNS && columns - v != COLUMNS + 1; v += COLUMNS)
    step.template operator()<COLUMNS>(v * WIDTH);
  for (; columns - v >= 2; v += 2) step.template operator()<2>(v * WIDTH);
  if (columns > v) step.template operator()<1>(v * WIDTH);
}

// Calls step.operator()<M>(first row): ROWS at a time, or half of them where that covers the rest.
template <typename Step>
inline PINRANK_INLINE void over_rows(int rows, Step&& step) {
  int i = 0;
  for (; rows - i > ROWS / 2; i += ROWS) step.template operator()<ROWS>(i);
  if (rows > i) step.template operator()<ROWS / 2>(i);
}

// out[rows][columns] = left[rows][depth] * right[depth][columns] + bias, where bias may be null.
// A few columns of `right` stay in the first-level cache while the rows of `left` pass.
template <typename Number>
inline void product(const Number* left, int left_stride, const Number* right, int right_stride, const float* bias,
                    float* out, int out_stride, int rows, int columns, int depth) {
  over_columns(columns / WIDTH, [&]<int N>(int c) PINRANK_INLINE {
    over_rows(rows, [&]<int M>(int i) PINRANK_INLINE {
      Vector sums[M][N];
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) sums[m][n] = bias ? load(bias + c + n * WIDTH) : Vector{};
      accumulate<1>(left + (size_t)i * left_stride, left_stride, right + c, right_stride, depth, sums);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) store(out + (size_t)(i + m) * out_stride + c + n * WIDTH, sums[m][n]);
    });
  });
}

// out[i][j] = left[i] . right[j] * scales[j] for two matrices with rows of `width` numbers, floats or pairs.
// Sums run along the vectors and are added up at the end, so that neither matrix has to be transposed.
template <typename Number>
inline void dot_products(const Number* left, const Number* right, int width, const float* scales, float* out,
                         int out_stride, int left_rows, int right_rows) {
  constexpr int M = REGISTERS == 32 ? 5 : 2;
  for (int j = 0; j < right_rows; j += 4)
    for (int i = 0; i < left_rows; i += M) {
      Vector sums[M][4] = {};
      for (int c = 0; c < width; c += WIDTH) {
        decltype(load(right)) column[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) column[n] = load(right + (size_t)(j + n) * width + c);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const auto row = load(left + (size_t)(i + m) * width + c);
#pragma GCC unroll 4
          for (int n = 0; n < 4; n++) sums[m][n] = multiply_add(row, column[n], sums[m][n]);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        store_four(out + (size_t)(i + m) * out_stride + j,
                   sum_of_each(sums[m][0], sums[m][1], sums[m][2], sums[m][3]) * load_four(scales + j));
    }
}

}  // namespace
}  // namespace PINRANK_ISA
