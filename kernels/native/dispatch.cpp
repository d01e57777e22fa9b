// Chooses the widest compiled instruction set that this processor supports.

#include "encoder.h"
#include "exports.h"

#define DECLARE(isa)                                                                                            \
  namespace isa {                                                                                               \
  int encode(const PinrankEncoder&, const int64_t*, const float*, const float*, const int32_t*, int, float*);   \
  double multiply_adds(int64_t);                                                                                \
  }

#define DECLARE_BF16(isa)                                                                                            \
  namespace isa {                                                                                                    \
  int encode_bf16(const PinrankEncoder&, const int64_t*, const float*, const float*, const int32_t*, int, float*);   \
  void product_bf16(const float*, const int32_t*, int32_t*, float*, int, int, int);                                  \
  }

DECLARE(portable)
DECLARE_BF16(portable)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE_BF16(avx512_bf16)
#endif

namespace {
enum Isa { PORTABLE, AVX2, AVX512 };

Isa widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PORTABLE;
}

// Whether this processor multiplies bf16 numbers by itself.
bool multiplies_bf16() {
#if defined(__x86_64__)
  return widest() == AVX512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}
}  // namespace

// The digest of the sources that this library was built from.
PINRANK_API const char* pinrank_sources() { return PINRANK_SOURCES; }

// The names of the values of `isa`, and the best value for this processor.
PINRANK_API const char* pinrank_isa_name(int isa) {
  static const char* const names[] = {"portable", "avx2", "avx512"};
  return isa >= 0 && isa <= AVX512 ? names[isa] : nullptr;
}

PINRANK_API int pinrank_isa_widest() { return widest(); }

// Encode rows row_splits[r]..row_splits[r + 1] of candidates for each request r.
// Returns 0 on success, 1 if out of memory, 2 if this processor lacks the instruction set.
PINRANK_API int pinrank_encode(int isa, const PinrankEncoder* encoder, const int64_t* actions, const float* pins,
                               const float* candidates, const int32_t* row_splits, int requests, float* out) {
  if (isa < PORTABLE || isa > widest() || encoder->length > PINRANK_LENGTH_MAX) return 2;
#if defined(__x86_64__)
  if (isa == AVX512) return avx512::encode(*encoder, actions, pins, candidates, row_splits, requests, out);
  if (isa == AVX2) return avx2::encode(*encoder, actions, pins, candidates, row_splits, requests, out);
#endif
  return portable::encode(*encoder, actions, pins, candidates, row_splits, requests, out);
}

// The instruction sets with products of bf16 numbers: `portable` computes them in steps, and is for tests.
PINRANK_API const char* pinrank_bf16_isa_name(int isa) {
  static const char* const names[] = {"portable", "avx512_bf16"};
  return isa >= 0 && isa <= multiplies_bf16() ? names[isa] : nullptr;
}

// The same with products of bf16 numbers. The arrays of weights of these products hold pairs.
PINRANK_API int pinrank_encode_bf16(int isa, const PinrankEncoder* encoder, const int64_t* actions, const float* pins,
                                    const float* candidates, const int32_t* row_splits, int requests, float* out) {
  if (!pinrank_bf16_isa_name(isa) || encoder->length > PINRANK_LENGTH_MAX) return 2;
#if defined(__x86_64__)
  if (isa) return avx512_bf16::encode_bf16(*encoder, actions, pins, candidates, row_splits, requests, out);
#endif
  return portable::encode_bf16(*encoder, actions, pins, candidates, row_splits, requests, out);
}

// A product alone: see encoder_bf16.cpp.
PINRANK_API void pinrank_product_bf16([[maybe_unused]] int isa, const float* left, const int32_t* right, int32_t* pairs,
                                      float* out, int rows, int columns, int depth) {
#if defined(__x86_64__)
  if (isa && multiplies_bf16()) return avx512_bf16::product_bf16(left, right, pairs, out, rows, columns, depth);
#endif
  portable::product_bf16(left, right, pairs, out, rows, columns, depth);
}

// Do multiply-adds out of registers, and return the number of floating-point operations; 0 if this processor lacks the
// instruction set.
PINRANK_API double pinrank_multiply_adds(int isa, int64_t steps) {
  if (isa < PORTABLE || isa > widest()) return 0.0;
#if defined(__x86_64__)
  if (isa == AVX512) return avx512::multiply_adds(steps);
  if (isa == AVX2) return avx2::multiply_adds(steps);
#endif
  return portable::multiply_adds(steps);
}
