// Fills the input tensors of one request from stored rows: float32 numbers and int64 codes.
//
// `model_store/model/tensor_plan.py` makes the parts once per model and checks the sources of each request. The reference
// is `NumpyAssembly` in assembly.py: the conversions here round as NumPy's do, so both give the same bits.

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "exports.h"
#include "sources.h"

static_assert(std::endian::native == std::endian::little, "stored rows are little-endian");

namespace {

// How a number is stored; the order is that of `STORED` in tensor_plan.py.
enum Stored : int64_t { F16, F32, F64, I8, I32, I64, U8, U16, U32 };

// A source whose rows were located.
struct Rows {
  const uint8_t* first;
  int64_t stride, count;

  const uint8_t* at(int64_t row, int64_t offset) const { return first + row * stride + offset; }
};

// Adjacent columns of a tensor that are adjacent fields of one type in the rows of a source.
struct Part {
  int64_t source, offset, stored, columns;
  int64_t codes;           // whether the tensor holds int64 codes and not float32 numbers
  int64_t plus;            // what is added to each code
  int64_t rows;            // rows of the tensor; -1: one per candidate. Rows that the source lacks are zeros.
  int64_t to, to_of_rows;  // the first number is at byte to + to_of_rows * (candidates, rounded up) of the arena
  int64_t to_stride;       // bytes of a row of the tensor
  float scale;             // factor of float32 numbers
};

// Tensors of candidates have room for a multiple of this many rows, so that the next one begins on a cache line.
constexpr int64_t ROWS = 16;

void halves_portable(const uint8_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
    // Move the exponent from float16's bias of 15 to float32's of 127. That of infinities and NaNs becomes the highest.
    uint32_t bits = magnitude + (112u << 23) + (magnitude >= (31u << 23) ? 112u << 23 : 0);
    // A subnormal float16 is m * 2^-24: of (1 + m / 2^10) * 2^-14, take 2^-14 away.
    const float low = std::bit_cast<float>(magnitude + (113u << 23)) - std::bit_cast<float>(113u << 23);
    if (magnitude < (1u << 23)) bits = std::bit_cast<uint32_t>(low);
    to[i] = std::bit_cast<float>(bits | static_cast<uint32_t>(half & 0x8000) << 16);
  }
}

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) void halves_f16c(const uint8_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m128i halves;
    std::memcpy(&halves, from + 2 * i, sizeof halves);
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  halves_portable(from + 2 * i, to + i, count - i);
}
#endif

using Halves = void (*)(const uint8_t*, float*, int64_t);

Halves fastest_halves() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c")) return halves_f16c;
#endif
  return halves_portable;
}

template <typename From, typename To>
void convert(const Part& part, const Rows& rows, uint8_t* out) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const uint8_t* from = rows.at(row, part.offset);
    To* to = reinterpret_cast<To*>(out + row * part.to_stride);
    for (int64_t column = 0; column < part.columns; ++column) {
      From number;  // rows are packed, so numbers are not aligned
      std::memcpy(&number, from + column * static_cast<int64_t>(sizeof number), sizeof number);
      to[column] = static_cast<To>(number);
    }
  }
}

void convert_halves(const Part& part, const Rows& rows, uint8_t* out) {
  static const Halves halves = fastest_halves();
  for (int64_t row = 0; row < rows.count; ++row)
    halves(rows.at(row, part.offset), reinterpret_cast<float*>(out + row * part.to_stride),
           part.columns);
}

void fill_numbers(const Part& part, const Rows& rows, uint8_t* out) {
  switch (part.stored) {
    case F16: convert_halves(part, rows, out); break;
    case F32: convert<float, float>(part, rows, out); break;
    case F64: convert<double, float>(part, rows, out); break;
    case I8: convert<int8_t, float>(part, rows, out); break;
    case I32: convert<int32_t, float>(part, rows, out); break;
    case I64: convert<int64_t, float>(part, rows, out); break;
  }
  if (part.scale == 1.0f) return;
  for (int64_t row = 0; row < rows.count; ++row) {
    float* to = reinterpret_cast<float*>(out + row * part.to_stride);
    for (int64_t column = 0; column < part.columns; ++column) to[column] *= part.scale;
  }
}

void fill_codes(const Part& part, const Rows& rows, uint8_t* out) {
  switch (part.stored) {
    case U8: convert<uint8_t, int64_t>(part, rows, out); break;
    case U16: convert<uint16_t, int64_t>(part, rows, out); break;
    case U32: convert<uint32_t, int64_t>(part, rows, out); break;
    case I64: convert<int64_t, int64_t>(part, rows, out); break;
  }
  if (part.plus == 0) return;
  for (int64_t row = 0; row < rows.count; ++row) {
    int64_t* to = reinterpret_cast<int64_t*>(out + row * part.to_stride);
    for (int64_t column = 0; column < part.columns; ++column) to[column] += part.plus;
  }
}

}  // namespace

// Fill the arena of one request, which begins on a cache line. No source has more rows than its tensors.
PINRANK_API void pinrank_assemble(const Part* parts, int64_t count, const uint8_t* block, int64_t candidates,
                                  uint8_t* arena) {
  const int64_t rounded = (candidates + ROWS - 1) / ROWS * ROWS;
  for (const Part* part = parts; part < parts + count; ++part) {
    Source source;
    std::memcpy(&source, block + part->source * static_cast<int64_t>(sizeof source), sizeof source);
    const uint8_t* first = source.in_block ? block + source.place : reinterpret_cast<const uint8_t*>(source.place);
    const Rows rows{first, source.stride, source.count};
    uint8_t* out = arena + part->to + part->to_of_rows * rounded;
    if (part->codes)
      fill_codes(*part, rows, out);
    else
      fill_numbers(*part, rows, out);
    const size_t bytes = static_cast<size_t>(part->columns * (part->codes ? 8 : 4));
    const int64_t wanted = part->rows < 0 ? candidates : part->rows;
    for (int64_t row = rows.count; row < wanted; ++row) std::memset(out + row * part->to_stride, 0, bytes);
  }
}
