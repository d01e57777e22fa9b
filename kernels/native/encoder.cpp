// The encoder with products of floats.

#include "encoding.h"

namespace PINRANK_ISA {

int encode(const PinrankEncoder& e, const int64_t* actions, const float* pins, const float* candidates,
           const int32_t* row_splits, int requests, float* out) {
  return encode_requests<float>(e, actions, pins, candidates, row_splits, requests, out);
}

}  // namespace PINRANK_ISA
