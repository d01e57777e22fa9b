// The arguments from kernels/encoder.py: sizes, and arrays laid out for the kernel. Not owned, read-only.
#pragma once

#include <cstdint>

#define PINRANK_LENGTH_MAX 1024

// Names follow kernels/encoder.py, which explains them; keep both in the same order. With one layer, the arrays from
// query_key2 to out_bias2 are null, and gain4 and shift4 are those of its last norm.
struct PinrankEncoder {
  int32_t length, rows, layers, actions, embedding;  // of a sequence; read; one or two; in the vocabulary; of a pin
  int32_t action, pin, pin_padded, own, own_padded, candidate, dim, dim_padded, hidden, basis;
  float epsilon1, epsilon2, epsilon3, epsilon4;
  const float *action_table, *pin_map, *pin_bias, *candidate_map, *candidate_bias;
  const float *own_query_key, *own_query_key_bias, *candidate_query_key;
  const float *both_of_basis, *both_of_candidate, *both_bias;
  const float *hidden_of_token, *hidden_bias1;
  const float *gain1, *real, *out_of_hidden1, *out_bias1;
  const float *query_key2, *query_key2_bias, *value_out2, *value_out2_bias, *gain2;
  const float *gain3, *shift3, *hidden_of_row2, *hidden_bias2, *out_of_hidden2, *out_bias2, *gain4, *shift4;
};
