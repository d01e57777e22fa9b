// Whole numbers that sort as utilities do.

#pragma once

#include <bit>
#include <cstdint>

inline bool is_finite(float value) { return (std::bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }

// A finite utility's place, ascending from the best to the worst; zeros of both signs are equal.
inline uint32_t descending(float utility) {
  const uint32_t bits = std::bit_cast<uint32_t>(utility + 0.0f);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}
