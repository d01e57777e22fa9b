// The early-fused encoder of two post-norm layers with one head, for one candidate after the other.
//
// Compiled once per instruction set (see build.py): the code says what happens to vectors of WIDTH floats, the
// compiler how. The mathematics is that of ranker/network/serving_form.py, folded further by kernels/encoder.py, which
// lays out every array this file reads; widths are padded to whole vectors with zeros.
//
// Three ideas keep the processor at its multipliers:
//   - a request's exponentials E (shared by all its candidates) meet a candidate's weighted basis in one small product
//     that stays in the first-level cache. The basis is [pin; one column per action; 1], narrower than the values it
//     spans, and its last column comes out as the softmax's denominator;
//   - rows pass through norm, feed-forward and norm in blocks of a few, in registers and the first-level cache, and
//     leave as one vector and one scale each. What a norm's scale and mean do to the next product is folded into it;
//   - in layer 2 only the rows that are read ask, and sixteen of them share a vector, so its softmax needs no
//     horizontal step.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "encoder.h"

namespace PINRANK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int ROWS = 8;  // times three vectors of sums fill 24 of 32 registers
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr int ROWS = 4;  // times three fill 12 of 16
#else
constexpr int WIDTH = 4;
constexpr int ROWS = 4;
#endif
constexpr int HALF_ROWS = ROWS / 2;
// exp(a + b) is taken as exp(a) exp(b), each relative to its own largest and cut this far below it. A row whose sum of
// weights comes out above DENOMINATOR_MIN = exp(-20) lost no more than a rounding error to the cut; the others, whose
// largest sum is far from the largest of either part, are computed anew as they stand.
constexpr float SPREAD_MAX = 40.0f;
constexpr float DENOMINATOR_MIN = 2.0611536e-9f;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Unaligned __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vector splat(float value) { return value - Vector{}; }  // x - 0 is x, which x + 0 is not for -0
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline int padded(int size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

template <int LANES>
struct Lanes {
  typedef float Type __attribute__((vector_size(LANES * 4)));
};

// Adds halves until four lanes are left; a store and a loop would wait for the store each time.
inline float sum(Vector value) {
  Lanes<4>::Type quarter;
#if defined(__AVX512F__)
  const Lanes<8>::Type half = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                              __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
  quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX__)
  quarter = __builtin_shufflevector(value, value, 0, 1, 2, 3) + __builtin_shufflevector(value, value, 4, 5, 6, 7);
#else
  quarter = value;
#endif
  quarter += __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1);
  return quarter[0] + quarter[1];
}

inline float largest(Vector value) {
  float top = value[0];
  for (int i = 1; i < WIDTH; i++) top = std::max(top, (float)value[i]);
  return top;
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

// sums[m][v] = sum over k of left[m][k] * right[k][v]: the product that all others consist of.
template <int M, int N>
inline __attribute__((always_inline)) void multiply(const float* left, int left_stride, const float* right,
                                                    int right_stride, int depth, Vector (&sums)[M][N]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sums[m][n] = Vector{};
  for (int k = 0; k < depth; k++) {
    Vector row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) row[n] = load(right + (size_t)k * right_stride + n * WIDTH);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Vector factor = splat(left[(size_t)m * left_stride + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[m][n] += factor * row[n];
    }
  }
}

// Calls step.operator()<N>(first column) over `columns` vectors of WIDTH, three at a time.
template <typename Step>
inline __attribute__((always_inline)) void over_columns(int columns, Step&& step) {
  int v = 0;
  for (; v + 3 <= columns; v += 3) step.template operator()<3>(v * WIDTH);
  if (columns - v == 2) step.template operator()<2>(v * WIDTH);
  if (columns - v == 1) step.template operator()<1>(v * WIDTH);
}

template <typename Step>
inline __attribute__((always_inline)) void over_rows(int rows, Step&& step) {
  int i = 0;
  for (; rows - i > HALF_ROWS; i += ROWS) step.template operator()<ROWS>(i);
  if (rows > i) step.template operator()<HALF_ROWS>(i);
}

// out[rows][columns] = left[rows][depth] * right[depth][columns] + bias, where bias may be null; rows are computed in
// blocks, so `left` and `out` need room for rows padded to ROWS.
void product(const float* left, int left_stride, const float* right, int right_stride, const float* bias, float* out,
             int out_stride, int rows, int columns, int depth) {
  over_rows(rows, [&]<int M>(int i) {
    over_columns(columns / WIDTH, [&]<int N>(int c) {
      Vector sums[M][N];
      multiply<M, N>(left + (size_t)i * left_stride, left_stride, right + c, right_stride, depth, sums);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < N; n++)
          store(out + (size_t)(i + m) * out_stride + c + n * WIDTH,
                sums[m][n] + (bias ? load(bias + c + n * WIDTH) : Vector{}));
    });
  });
}

// Row-wise norm of float[rows][width], `size` of them real: out = (x - mean) / deviation * gain + shift, in place.
void normalise(float* values, int rows, int width, int size, float epsilon, const float* gain, const float* shift) {
  for (int i = 0; i < rows; i++) {
    float* row = values + (size_t)i * width;
    Vector total{}, squares{};
    for (int c = 0; c < width; c += WIDTH) total += load(row + c);
    const float mean = sum(total) / size;
    for (int c = 0; c < size; c++) row[c] -= mean;  // the padding stays zero
    for (int c = 0; c < width; c += WIDTH) squares += load(row + c) * load(row + c);
    const float scale = 1.0f / std::sqrt(sum(squares) / size + epsilon);
    for (int c = 0; c < width; c += WIDTH) store(row + c, load(row + c) * scale * load(gain + c) + load(shift + c));
  }
}

// Turn rows of scores into exp(score - the row's largest), 0 beyond `length`.
void exponentiate(float* scores, int rows, int stride, int length) {
  for (int i = 0; i < rows; i++) {
    float* row = scores + (size_t)i * stride;
    Vector tops = load(row);
    int from = WIDTH;
    for (; from + WIDTH <= length; from += WIDTH) tops = larger(tops, load(row + from));
    float top = length < WIDTH ? *std::max_element(row, row + length) : largest(tops);
    for (; from < length; from++) top = std::max(top, row[from]);
    for (int c = 0; c < padded(length); c += WIDTH)
      store(row + c, exponential(larger(load(row + c) - top, splat(-SPREAD_MAX))));
    std::fill(row + length, row + padded(length), 0.0f);
  }
}

// Memory for one call, split into arrays that start on cache lines. Without memory it counts the bytes needed.
class Arena {
 public:
  explicit Arena(float* memory = nullptr) : memory_(memory) {}
  float* take(size_t floats) {
    float* taken = memory_ ? memory_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return taken;
  }
  size_t used() const { return used_; }

 private:
  float* memory_;
  size_t used_ = 0;
};

// A thread's memory stays its own from call to call: fresh pages would cost a fault each.
float* thread_memory(size_t floats) {
  struct Freed {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Freed> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, floats * 4)));
    size = memory ? floats : 0;
    // Blocks compute a few rows past the last one. The values there must not be slow to compute with (denormals).
    if (memory) std::memset(memory.get(), 0, floats * 4);
  }
  return memory.get();
}

class Encoding {
 public:
  Encoding(const PinrankEncoder& e, Arena&& arena) : e(e) {
    const size_t slack = 2 * ROWS;  // blocks may read and write past the last row
    const size_t length = padded(e.length) + slack, chunk = CHUNK + slack, asked = padded(e.rows) + slack;
    const size_t token = std::max(e.own, e.dim_padded);
    embeddings = arena.take(length * e.embedding);
    own = arena.take(length * token);
    own_across = arena.take((e.own + slack) * length);
    mapped = arena.take(length * token);
    scores = arena.take(length * length);
    shared = arena.take(length * length);
    candidate_keys = arena.take((e.candidate + slack) * length);
    basis = arena.take(length * e.basis);
    own_centred = arena.take(length * e.dim_padded);
    own_hidden = arena.take(length * e.hidden);
    candidate = arena.take(chunk * e.candidate);
    candidate_in = arena.take(chunk * e.embedding);
    offsets = arena.take(chunk * length);
    weights = arena.take(chunk * length);
    mixture = arena.take(length);
    candidate_centred = arena.take(chunk * e.dim_padded);
    candidate_hidden = arena.take(chunk * e.hidden);
    weighted = arena.take(length * e.basis);
    outputs = arena.take(length * e.dim_padded);
    scales = arena.take(length);
    spans = arena.take(asked * e.basis);
    block = arena.take(slack * e.dim_padded);
    hidden = arena.take(std::max(slack, asked) * e.hidden);
    asking = arena.take(asked * e.dim_padded);
    queries = arena.take(asked * e.dim_padded);
    queries_across = arena.take((e.dim_padded + slack) * padded(e.rows));
    attention = arena.take(length * padded(e.rows));
    read = arena.take(asked * e.dim_padded);
    attended = arena.take(asked * e.dim_padded);
    floats = arena.used();
  }

  size_t floats;

  // Encode one request's candidates; out is float[count][rows][dim].
  void run(const int64_t* actions, const float* pins, const float* candidates, int count, float* out) {
    begin(actions, pins);
    if (present == 0) {
      std::fill(out, out + (size_t)count * e.rows * e.dim, 0.0f);
      return;
    }
    for (int first = 0; first < count; first += CHUNK) {
      const int size = std::min(CHUNK, count - first);
      prepare(candidates + (size_t)first * e.embedding, size);
      for (int n = 0; n < size; n++) {
        first_layer(n);
        last_layer();
        deliver(out + (size_t)(first + n) * e.rows * e.dim);
      }
    }
  }

 private:
  static constexpr int CHUNK = 32;  // candidates whose small products are made together

  // Everything that all candidates of a request share. Absent actions are skipped.
  void begin(const int64_t* actions, const float* pins) {
    present = 0;
    asked = 0;
    for (int i = 0; i < e.length; i++) {
      if (actions[i] <= 0 || actions[i] > e.actions) continue;
      std::memcpy(embeddings + (size_t)present * e.embedding, pins + (size_t)i * e.embedding, e.embedding * 4);
      codes[present] = (int)actions[i];
      if (i < e.rows) position[asked++] = i;
      present++;
    }
    if (present == 0) return;
    stride = padded(present);
    std::fill(embeddings + (size_t)present * e.embedding, embeddings + (size_t)(present + ROWS) * e.embedding, 0.0f);
    // own = [action; pin], and the same across.
    product(embeddings, e.embedding, e.pin_map, e.pin_padded, e.pin_bias, mapped, e.pin_padded, present, e.pin_padded,
            e.embedding);
    for (int i = 0; i < present; i++) {
      std::memcpy(own + (size_t)i * e.own, e.action_table + (size_t)codes[i] * e.action, e.action * 4);
      std::memcpy(own + (size_t)i * e.own + e.action, mapped + (size_t)i * e.pin_padded, e.pin * 4);
      float* spanned = basis + (size_t)i * e.basis;
      std::fill(spanned, spanned + e.basis, 0.0f);
      std::memcpy(spanned, mapped + (size_t)i * e.pin_padded, e.pin * 4);
      spanned[e.pin_padded + codes[i] - 1] = 1.0f;
      spanned[e.pin_padded + e.actions] = 1.0f;
    }
    for (int k = 0; k < e.own; k++) {
      for (int i = 0; i < present; i++) own_across[(size_t)k * stride + i] = own[(size_t)i * e.own + k];
      std::fill(own_across + (size_t)k * stride + present, own_across + (size_t)(k + 1) * stride, 0.0f);
    }
    product(own, e.own, e.own_query_key, e.own_padded, e.own_query_key_bias, mapped, e.own_padded, present,
            e.own_padded, e.own);
    product(mapped, e.own_padded, own_across, stride, nullptr, scores, stride, present, stride, e.own);
    std::memcpy(shared, scores, (size_t)present * stride * 4);
    exponentiate(shared, present, stride, present);
    product(e.candidate_query_key, e.own, own_across, stride, nullptr, candidate_keys, stride, e.candidate, stride,
            e.own);
    // The tokens' own part of the residual, centred, and its product with the feed-forward's first map.
    for (int i = 0; i < present; i++) {
      const float* from = own + (size_t)i * e.own;
      float* to = own_centred + (size_t)i * e.dim_padded;
      float total = 0.0f;
      for (int k = 0; k < e.own; k++) total += from[k];
      const float mean = total / e.dim;
      for (int k = 0; k < e.dim; k++) to[k] = (k < e.own ? from[k] : 0.0f) - mean;
      std::fill(to + e.dim, to + e.dim_padded, 0.0f);
    }
    product(own_centred, e.dim_padded, e.hidden_of_token, e.hidden, nullptr, own_hidden, e.hidden, present, e.hidden,
            e.dim);
  }

  // What each of a chunk of candidates brings: its attention weights and its part of every row.
  void prepare(const float* from, int count) {
    std::memcpy(candidate_in, from, (size_t)count * e.embedding * 4);
    product(candidate_in, e.embedding, e.candidate_map, e.candidate, e.candidate_bias, candidate, e.candidate, count,
            e.candidate, e.embedding);
    product(candidate, e.candidate, candidate_keys, stride, nullptr, offsets, stride, count, stride, e.candidate);
    std::memcpy(weights, offsets, (size_t)count * stride * 4);
    exponentiate(weights, count, stride, present);
    product(candidate, e.candidate, e.row_of_candidate, e.dim_padded, e.row_bias, candidate_centred, e.dim_padded,
            count, e.dim_padded, e.candidate);
    product(candidate, e.candidate, e.hidden_of_candidate, e.hidden, e.hidden_row_bias, candidate_hidden, e.hidden,
            count, e.hidden, e.candidate);
  }

  void first_layer(int n) {
    const float* weight = weights + (size_t)n * stride;
    for (int i = 0; i < present; i++)
      for (int c = 0; c < e.basis; c += WIDTH)
        store(weighted + (size_t)i * e.basis + c, load(basis + (size_t)i * e.basis + c) * weight[i]);
    const float* centred = candidate_centred + (size_t)n * e.dim_padded;
    const float* inner = candidate_hidden + (size_t)n * e.hidden;
    const float* offset = offsets + (size_t)n * stride;
    over_rows(present, [&]<int M>(int i) { rows_of_first_layer<M>(i, offset, centred, inner); });
  }

  // One row's mixture of the basis by a plain softmax of the summed scores.
  void mix_as_it_stands(int i, const float* offset, float* mixed) {
    const float* score = scores + (size_t)i * stride;
    for (int j = 0; j < present; j++) mixture[j] = score[j] + offset[j];
    exponentiate(mixture, 1, stride, present);
    for (int c = 0; c < e.basis; c += WIDTH) {
      Vector total{};
      for (int j = 0; j < present; j++) total += load(basis + (size_t)j * e.basis + c) * mixture[j];
      store(mixed + c, total);
    }
  }

  template <int M>
  void rows_of_first_layer(int i, const float* offset, const float* centred, const float* inner) {
    const int spanned = e.pin_padded + e.actions;  // the denominator's column spans nothing
    over_columns(e.basis / WIDTH, [&]<int N>(int c) {
      Vector sums[M][N];
      multiply<M, N>(shared + (size_t)i * stride, stride, weighted + c, e.basis, present, sums);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) store(spans + m * e.basis + c + v * WIDTH, sums[m][v]);
    });
    for (int m = 0; m < M; m++)
      if (i + m < present && !(spans[m * e.basis + spanned] >= DENOMINATOR_MIN))
        mix_as_it_stands(i + m, offset, spans + m * e.basis);
    float share[M], scale[M], mean[M];
    Vector squares[M], gained[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      share[m] = 1.0f / std::max(spans[m * e.basis + spanned], 1e-37f);
      squares[m] = gained[m] = Vector{};
    }
    // Rows before the first norm, already centred.
    over_columns(e.dim_padded / WIDTH, [&]<int N>(int c) {
      Vector sums[M][N];
      multiply<M, N>(spans, e.basis, e.row_of_basis + c, e.dim_padded, spanned, sums);
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        const int at = c + v * WIDTH;
        const Vector own_part = load(centred + at), gain = load(e.gain1 + at);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const Vector row = sums[m][v] * share[m] + (load(own_centred + (size_t)(i + m) * e.dim_padded + at) + own_part);
          store(block + m * e.dim_padded + at, row);
          squares[m] += row * row;
          gained[m] += row * gain;
        }
      }
    });
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      scale[m] = 1.0f / std::sqrt(sum(squares[m]) / e.dim + e.epsilon1);
      mean[m] = sum(gained[m]) / e.dim;
      squares[m] = Vector{};
    }
    over_columns(e.hidden / WIDTH, [&]<int N>(int c) {
      Vector sums[M][N];
      multiply<M, N>(spans, e.basis, e.hidden_of_basis + c, e.hidden, spanned, sums);
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        const int at = c + v * WIDTH;
        const Vector own_part = load(inner + at), bias = load(e.hidden_bias1 + at);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const Vector row = sums[m][v] * share[m] + (load(own_hidden + (size_t)(i + m) * e.hidden + at) + own_part);
          store(hidden + m * e.hidden + at, larger(row * scale[m] + bias, Vector{}));
        }
      }
    });
    over_columns(e.dim_padded / WIDTH, [&]<int N>(int c) {
      Vector sums[M][N];
      multiply<M, N>(hidden, e.hidden, e.out_of_hidden1 + c, e.dim_padded, e.hidden, sums);
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        const int at = c + v * WIDTH;
        const Vector gain = load(e.gain1 + at), bias = load(e.out_bias1 + at), real = load(e.real + at);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const Vector row = load(block + m * e.dim_padded + at) * gain - mean[m] * real;
          const Vector total = sums[m][v] + row * scale[m] + bias;
          store(outputs + (size_t)(i + m) * e.dim_padded + at, total);
          squares[m] += total * total;
        }
      }
    });
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) scales[i + m] = 1.0f / std::sqrt(sum(squares[m]) / e.dim + e.epsilon2);
  }

  // Layer 2, for the rows that are read. `outputs` are centred; a row's norm is its scale, gain and shift.
  void last_layer() {
    if (asked == 0) return;
    const int lanes = padded(asked), width = e.dim_padded;
    for (int i = 0; i < asked; i++)
      for (int c = 0; c < width; c += WIDTH)
        store(asking + (size_t)i * width + c, load(outputs + (size_t)i * width + c) * scales[i]);
    product(asking, width, e.query_key2, width, e.query_key2_bias, queries, width, asked, width, e.dim);
    for (int i = 0; i < lanes; i++)
      for (int k = 0; k < e.dim; k++)
        queries_across[(size_t)k * lanes + i] = i < asked ? queries[(size_t)i * width + k] : 0.0f;
    over_columns(lanes / WIDTH, [&]<int N>(int c) {
      over_rows(present, [&]<int M>(int j) {
        Vector sums[M][N];
        multiply<M, N>(outputs + (size_t)j * width, width, queries_across + c, lanes, e.dim, sums);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
          for (int v = 0; v < N; v++)
            store(attention + (size_t)(j + m) * lanes + c + v * WIDTH, sums[m][v] * scales[j + m]);
      });
      Vector top[N], total[N];
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) top[v] = splat(-3e38f), total[v] = Vector{};
      for (int j = 0; j < present; j++)
#pragma GCC unroll 16
        for (int v = 0; v < N; v++)
          top[v] = larger(top[v], load(attention + (size_t)j * lanes + c + v * WIDTH));
      for (int j = 0; j < present; j++)
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) {
          float* at = attention + (size_t)j * lanes + c + v * WIDTH;
          const Vector weight = exponential(larger(load(at) - top[v], splat(-80.0f)));
          total[v] += weight;
          store(at, weight * scales[j]);
        }
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) store(spans + c + v * WIDTH, 1.0f / total[v]);
    });
    mix(lanes, width);
    product(read, width, e.value_out2, width, e.value_out2_bias, attended, width, asked, width, e.dim);
    for (int i = 0; i < asked; i++)
      for (int c = 0; c < width; c += WIDTH) {
        float* row = attended + (size_t)i * width + c;
        store(row, load(row) + load(asking + (size_t)i * width + c) * load(e.gain2 + c));
      }
    normalise(attended, asked, width, e.dim, e.epsilon3, e.gain3, e.shift3);
    product(attended, width, e.hidden_of_row2, e.hidden, e.hidden_bias2, hidden, e.hidden, asked, e.hidden, e.dim);
    for (int i = 0; i < asked * e.hidden; i++) hidden[i] = std::max(hidden[i], 0.0f);
    product(hidden, e.hidden, e.out_of_hidden2, width, e.out_bias2, read, width, asked, width, e.hidden);
    for (int i = 0; i < asked * width; i++) read[i] += attended[i];
    normalise(read, asked, width, e.dim, e.epsilon4, e.gain4, e.shift4);
  }

  // read[i] = the mean of `outputs` that row i's attention makes; attention lies [present][lanes].
  void mix(int lanes, int width) {
    constexpr int M = WIDTH == 16 ? 5 : HALF_ROWS;
    for (int i = 0; i < asked; i += M)
      over_columns(width / WIDTH, [&]<int N>(int c) {
        Vector sums[M][N];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
          for (int v = 0; v < N; v++) sums[m][v] = Vector{};
        for (int j = 0; j < present; j++) {
          Vector row[N];
#pragma GCC unroll 8
          for (int v = 0; v < N; v++) row[v] = load(outputs + (size_t)j * width + c + v * WIDTH);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            const Vector factor = splat(attention[(size_t)j * lanes + i + m]);
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sums[m][v] += factor * row[v];
          }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
          for (int v = 0; v < N; v++)
            store(read + (size_t)(i + m) * width + c + v * WIDTH, sums[m][v] * spans[std::min(i + m, lanes - 1)]);
      });
  }

  void deliver(float* out) {
    std::fill(out, out + (size_t)e.rows * e.dim, 0.0f);
    for (int i = 0; i < asked; i++)
      std::memcpy(out + (size_t)position[i] * e.dim, read + (size_t)i * e.dim_padded, e.dim * 4);
  }

  const PinrankEncoder& e;
  int present = 0, asked = 0, stride = 0;
  int codes[PINRANK_LENGTH_MAX], position[PINRANK_LENGTH_MAX];
  float *embeddings, *own, *own_across, *mapped, *scores, *shared, *candidate_keys, *basis, *own_centred, *own_hidden;
  float *mixture, *candidate, *candidate_in, *offsets, *weights, *candidate_centred, *candidate_hidden;
  float *weighted, *outputs, *scales, *spans, *block, *hidden;
  float *asking, *queries, *queries_across, *attention, *read, *attended;
};

}  // namespace

int encode(const PinrankEncoder& e, const int64_t* actions, const float* pins, const float* candidates,
           const int32_t* row_splits, int requests, float* out) {
  float* memory = thread_memory(Encoding(e, Arena()).floats);
  if (!memory) return 1;
  Encoding encoding(e, Arena(memory));
  for (int r = 0; r < requests; r++) {
    const size_t first = row_splits[r];
    encoding.run(actions + (size_t)r * e.length, pins + (size_t)r * e.length * e.embedding,
                 candidates + first * e.embedding, row_splits[r + 1] - row_splits[r], out + first * e.rows * e.dim);
  }
  return 0;
}

}  // namespace PINRANK_ISA
