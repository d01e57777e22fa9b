// The encoder with products of bf16 numbers, and such a product alone, which tests compare with NumPy's.

#include "encoding.h"

namespace PINRANK_ISA {

int encode_bf16(const PinrankEncoder& e, const int64_t* actions, const float* pins, const float* candidates,
                const int32_t* row_splits, int requests, float* out) {
  return encode_requests<Pair>(e, actions, pins, candidates, row_splits, requests, out);
}

// out[rows][columns] = left[rows][depth] * right[depth][columns], where `right` holds its rows in pairs. `left` and `out`
// have SLACK rows to spare, and `pairs` has room for `left`. Columns and depth are multiples of 16.
void product_bf16(const float* left, const int32_t* right, int32_t* pairs, float* out, int rows, int columns,
                  int depth) {
  product(row_pairs(left, (size_t)rows * depth, reinterpret_cast<Pair*>(pairs)), depth / 2,
          reinterpret_cast<const Pair*>(right), columns, nullptr, out, columns, rows, columns, depth / 2);
}

}  // namespace PINRANK_ISA
