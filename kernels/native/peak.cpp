// How many multiply-adds one core can do at most, with everything in registers: what benchmarks compare kernels with.

#include "vectors.h"

namespace PINRANK_ISA {

// Does `steps` multiply-adds with each of twelve vectors, and returns the number of floating-point operations.
double multiply_adds(int64_t steps) {
  constexpr int SUMS = 12;  // more than the two multipliers times their four or five cycles
  volatile float half = 0.5f;
  const Vector factor = splat(half), added = splat(half);
  Vector sums[SUMS];
  for (int i = 0; i < SUMS; i++) sums[i] = splat((float)i);
  for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * factor + added;
  Vector total{};
  for (int i = 0; i < SUMS; i++) total += sums[i];
  volatile float read = sum(total);
  (void)read;
  return 2.0 * WIDTH * SUMS * steps;
}

}  // namespace PINRANK_ISA
