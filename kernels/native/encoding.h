// The early-fused encoder of one or two post-norm layers with one head, for a few candidates at a time.
//
// Compiled once per instruction set (see build.py): the code says what happens to vectors of WIDTH floats, the
// compiler how. `Number` says what the products of layers 1 and 2 multiply: floats, or pairs of bf16 numbers (pairs.h).
// Everything else is float32, and so are all sums. The mathematics is that of ranker/network/serving_form.py, folded
// further by kernels/encoder.py, which lays out every array this file reads; widths are padded to whole vectors with
// zeros.
//
// Four ideas keep the processor at its multipliers:
//   - a request's exponentials E (shared by all its candidates) meet the weighted bases of a group of candidates in one
//     product. A basis is [pin; one column per action], narrower than the values it spans. The sum over the columns of
//     the actions is the softmax's denominator. Candidates alternate from column to column, so that a group's columns
//     fill whole vectors, whatever the width of a basis;
//   - layer 1 sweeps over the rows of a group: each sweep is a product whose tiles end with row-wise work on sums that
//     are still in registers. What a norm's scale and mean do to the next product is folded into that work;
//   - in the last layer only the rows that are read ask. In layer 2, each map of a group's rows is one product;
//   - sums across a vector are made for four vectors together.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "arena.h"
#include "encoder.h"
#include "pairs.h"
#include "products.h"

namespace PINRANK_ISA {
namespace {

// exp(a + b) is taken as exp(a) exp(b), each relative to its own largest and cut SPREAD_MAX below it. A row whose sum
// of weights comes out above DENOMINATOR_MIN = exp(-20) lost no more than a rounding error to the cut. The others,
// whose largest sum is far from the largest of either part, are computed anew as they stand.
constexpr float DENOMINATOR_MIN = 2.0611536e-9f;

constexpr int GROUP = 4;   // candidates that share products; what they need fits the second-level cache
constexpr int CHUNK = 32;  // candidates whose own maps are made together

// Row-wise norm of float[rows][width]: (x - mean) / deviation * gain + shift, in place. `real` is 1 in the `size`
// columns that are not padding, and 0 elsewhere, as x, gain and shift are.
void normalise(float* values, int rows, int width, int size, float epsilon, const float* real, const float* gain,
               const float* shift) {
  for (int i = 0; i < rows; i += 4) {
    float* row = values + (size_t)i * width;
    Vector totals[4] = {}, squares[4] = {};
    float mean[4], scale[4];
    for (int c = 0; c < width; c += WIDTH)
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) totals[m] += load(row + m * width + c);
    sum_of_each(totals, mean);
    for (int m = 0; m < 4; m++) mean[m] /= size;
    for (int c = 0; c < width; c += WIDTH)
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) {
        const Vector centred = load(row + m * width + c) - mean[m] * load(real + c);
        squares[m] += centred * centred;
      }
    sum_of_each(squares, scale);
    for (int m = 0; m < 4; m++) scale[m] = 1.0f / std::sqrt(scale[m] / size + epsilon);
    for (int c = 0; c < width; c += WIDTH)
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) {
        float* at = row + m * width + c;
        store(at, (load(at) - mean[m]) * scale[m] * load(gain + c) + load(shift + c));
      }
  }
}

template <typename Number>
class Encoding {
  static constexpr bool PAIRS = PER<Number> == 2;

 public:
  Encoding(const PinrankEncoder& e, Arena&& arena)
      : e(e),
        width(e.dim_padded),
        both(e.dim_padded + e.hidden),
        columns(padded(e.basis * GROUP)),
        span_stride(PAIRS ? padded((columns + 1) / 2) : columns),
        basis_room(padded(e.basis) + WIDTH) {
    const size_t length = padded(e.length) + SLACK, chunk = CHUNK + SLACK, asked = GROUP * e.rows + SLACK;
    room = length;
    embeddings = arena.take(length * e.embedding);
    pins = arena.take(length * e.pin_padded);
    own = arena.take(length * e.own);
    own_across = arena.take((e.own + SLACK) * length);
    own_queries = arena.take(length * e.own_padded);
    own_both = arena.take(length * both);
    scores = arena.take(length * length);
    shared = arena.take(length * length);
    shared_numbers = numbers(arena, shared, length * length);
    candidate_keys = arena.take((e.candidate + SLACK) * length);
    candidate_in = arena.take(chunk * e.embedding);
    candidate = arena.take(chunk * e.candidate);
    candidate_both = arena.take(chunk * both);
    offsets = arena.take(chunk * length);
    weights = arena.take(chunk * length);
    basis = arena.take(length * basis_room);
    weighted = reinterpret_cast<Number*>(arena.take(length * columns / PER<Number>));
    spans = arena.take(length * columns);
    span_numbers = numbers(arena, spans, PER<Number> * length * span_stride);
    mixture = arena.take(length);
    mixed = arena.take(basis_room);
    alternating = arena.take(length * GROUP + WIDTH);
    shares = arena.take(length * GROUP);
    outputs = arena.take(GROUP * length * width);
    scales = arena.take(GROUP * length);
    means = arena.take(GROUP * length);
    asking = arena.take(asked * width);
    queries = arena.take(asked * width);
    attention = arena.take((e.rows + SLACK) * length);
    read = arena.take(asked * width);
    attended = arena.take(asked * width);
    hidden = arena.take(asked * e.hidden);
    hidden_numbers = reinterpret_cast<Number*>(arena.take(GROUP * length * e.hidden / PER<Number>));
    if constexpr (PAIRS) {
      left = reinterpret_cast<Number*>(arena.take(asked * std::max({width, e.hidden, padded(e.length)}) / 2));
      output_rows = reinterpret_cast<Number*>(arena.take(GROUP * length * width / 2));
      output_columns = reinterpret_cast<Number*>(arena.take(length * width / 2));
    }
    floats = arena.used();
  }

  size_t floats;

  // Encode one request's candidates; out is float[count][rows][dim].
  void run(const int64_t* actions, const float* acted, const float* candidates, int count, float* out) {
    begin(actions, acted);
    if (asked < e.rows) std::fill(out, out + (size_t)count * e.rows * e.dim, 0.0f);
    if (asked == 0) return;
    for (int first = 0; first < count; first += CHUNK) {
      const int size = std::min(CHUNK, count - first);
      prepare(candidates + (size_t)first * e.embedding, size);
      for (int n = 0; n < size; n += GROUP)
        encode(n, std::min(GROUP, size - n), out + (size_t)(first + n) * e.rows * e.dim);
    }
  }

 private:
  // Everything that all candidates of a request share. Absent actions are skipped.
  void begin(const int64_t* actions, const float* acted) {
    present = 0;
    asked = 0;
    for (int i = 0; i < e.length; i++) {
      if (actions[i] <= 0 || actions[i] > e.actions) continue;
      std::memcpy(embeddings + (size_t)present * e.embedding, acted + (size_t)i * e.embedding, e.embedding * 4);
      codes[present] = (int)actions[i];
      if (i < e.rows) position[asked++] = i;
      present++;
    }
    if (asked == 0) return;
    // All rows are keys of the last layer; only those that are read are its queries, and they stand first.
    asking_first = e.layers == 1 ? asked : present;
    stride = padded(present);
    std::fill(embeddings + (size_t)present * e.embedding, embeddings + (size_t)(present + ROWS) * e.embedding, 0.0f);
    product(embeddings, e.embedding, e.pin_map, e.pin_padded, e.pin_bias, pins, e.pin_padded, present, e.pin_padded,
            e.embedding);
    // own = [action; pin], and the same across.
    for (int i = 0; i < present; i++) {
      std::memcpy(own + (size_t)i * e.own, e.action_table + (size_t)codes[i] * e.action, e.action * 4);
      std::memcpy(own + (size_t)i * e.own + e.action, pins + (size_t)i * e.pin_padded, e.pin * 4);
      float* spanned = basis + i * basis_room;
      std::memcpy(spanned, pins + (size_t)i * e.pin_padded, e.pin * 4);
      std::fill(spanned + e.pin, spanned + basis_room, 0.0f);
      spanned[e.pin + codes[i] - 1] = 1.0f;
    }
    for (int k = 0; k < e.own; k++) {
      for (int i = 0; i < present; i++) own_across[(size_t)k * stride + i] = own[(size_t)i * e.own + k];
      std::fill(own_across + (size_t)k * stride + present, own_across + (size_t)(k + 1) * stride, 0.0f);
    }
    product(own, e.own, e.own_query_key, e.own_padded, e.own_query_key_bias, own_queries, e.own_padded,
            asking_first, e.own_padded, e.own);
    product(own_queries, e.own_padded, own_across, stride, nullptr, scores, stride, asking_first, stride, e.own);
    std::memcpy(shared, scores, (size_t)asking_first * stride * 4);
    exponentiate(shared, asking_first, stride, present);
    row_pairs(shared, (size_t)asking_first * stride, shared_numbers);
    product(e.candidate_query_key, e.own, own_across, stride, nullptr, candidate_keys, stride, e.candidate, stride,
            e.own);
    // The tokens' own part of the residual, centred, and its product with the feed-forward's first map.
    for (int i = 0; i < asking_first; i++) {
      const float* from = own + (size_t)i * e.own;
      float* to = own_both + (size_t)i * both;
      float total = 0.0f;
      for (int k = 0; k < e.own; k++) total += from[k];
      const float mean = total / e.dim;
      for (int k = 0; k < e.dim; k++) to[k] = (k < e.own ? from[k] : 0.0f) - mean;
      std::fill(to + e.dim, to + width, 0.0f);
    }
    product(own_both, both, e.hidden_of_token, e.hidden, nullptr, own_both + width, both, asking_first, e.hidden, e.dim);
  }

  // What each of a chunk of candidates brings: its attention weights and its part of every row.
  void prepare(const float* from, int count) {
    std::memcpy(candidate_in, from, (size_t)count * e.embedding * 4);
    product(candidate_in, e.embedding, e.candidate_map, e.candidate, e.candidate_bias, candidate, e.candidate, count,
            e.candidate, e.embedding);
    product(candidate, e.candidate, candidate_keys, stride, nullptr, offsets, stride, count, stride, e.candidate);
    std::memcpy(weights, offsets, (size_t)count * stride * 4);
    exponentiate(weights, count, stride, present);
    product(candidate, e.candidate, e.both_of_candidate, both, e.both_bias, candidate_both, both, count, both,
            e.candidate);
  }

  // Encode `count` candidates of a chunk, from the first one on.
  void encode(int first, int count, float* out) {
    mix_bases(first, count);
    first_layer(first, count);
    if (e.layers == 1)
      outputs_of_first_layer(count);
    else
      last_layer(count);
    const float* row = read;
    for (int n = 0; n < count; n++)
      for (int i = 0; i < asked; i++, row += width)
        std::memcpy(out + ((size_t)n * e.rows + position[i]) * e.dim, row, e.dim * 4);
  }

  // spans[i] = each candidate's mixture of the basis for row i, and shares[i] = what is to be multiplied with it. The
  // candidates of a group alternate from number to number.
  void mix_bases(int first, int count) {
    for (int n = 0; n < count; n++)
      for (int j = 0; j < present; j++) alternating[j * GROUP + n] = weights[(size_t)(first + n) * stride + j];
    weigh_bases();
    product(shared_numbers, stride / PER<Number>, weighted, columns, nullptr, spans, columns, asking_first, columns,
            steps(present));
    for (int i = 0; i < asking_first; i++) {
      float* span = spans + (size_t)i * columns;
      Four total = sum_of_weights(span);
      for (int n = 0; n < count; n++)
        if (!(total[n] >= DENOMINATOR_MIN)) {
          mix_as_it_stands(first + n, i, span + n);
          total = sum_of_weights(span);
        }
      store_four(shares + i * GROUP, 1.0f / total);
      if constexpr (PAIRS)
        for (int c = 0; c < columns; c += 2 * WIDTH)
          store(span_numbers + (size_t)i * span_stride + c / 2,
                zipped_fours(load(span + c), c + WIDTH < columns ? load(span + c + WIDTH) : Vector{}));
    }
  }

  // weighted[j] = the basis of action j times each candidate's weight of it; in pairs, of actions 2j and 2j + 1.
  void weigh_bases() {
    const auto at = [&](int j, int c, Vector weight) PINRANK_INLINE {
      return spread(load(basis + j * basis_room + c / GROUP)) * weight;
    };
    for (int j = 0; j < present; j += PER<Number>) {
      const Vector weight = repeated(load(alternating + j * GROUP));
      Number* row = weighted + (size_t)(j / PER<Number>) * columns;
      if constexpr (PAIRS) {
        const bool pair = j + 1 < present;
        const Vector next = pair ? repeated(load(alternating + (j + 1) * GROUP)) : Vector{};
        for (int c = 0; c < columns; c += WIDTH)
          store(row + c, zipped(at(j, c, weight), pair ? at(j + 1, c, next) : Vector{}));
      } else {
        for (int c = 0; c < columns; c += WIDTH) store(row + c, at(j, c, weight));
      }
    }
  }

  Four sum_of_weights(const float* span) {
    Four total{};
    for (int a = 0; a < e.actions; a++) total += load_four(span + (e.pin + a) * GROUP);
    return total;
  }

  // Replaces a candidate's part of spans[i] by what a plain softmax of the summed scores mixes.
  void mix_as_it_stands(int candidate, int i, float* span) {
    const float *score = scores + (size_t)i * stride, *offset = offsets + (size_t)candidate * stride;
    for (int j = 0; j < present; j++) mixture[j] = score[j] + offset[j];
    exponentiate(mixture, 1, stride, present);
    for (int c = 0; c < e.basis; c += WIDTH) {
      Vector total{};
      for (int j = 0; j < present; j++) total += load(basis + j * basis_room + c) * mixture[j];
      store(mixed + c, total);
    }
    for (int c = 0; c < e.basis; c++) span[c * GROUP] = mixed[c];
  }

  // Layer 1 of a group of candidates, in sweeps over all of its rows, so that none waits for its own sums.
  void first_layer(int first, int count) {
    rows_before_norm(first, count);
    hidden_values(first, count);
    for (int n = 0; n < count; n++) rows_after_feed_forward(n);
  }

  // Rows before the first norm, already centred, and the scales of that norm.
  void rows_before_norm(int first, int count) {
    over_rows(asking_first, [&]<int M>(int i) PINRANK_INLINE {
      for (int n = 0; n < count; n++) {
        float* rows = outputs + (n * room + i) * width;
        Vector squares[M] = {};
        over_columns(width / WIDTH, [&]<int N>(int c) PINRANK_INLINE {
          Vector sums[M][N] = {};
          accumulate<GROUP>(span_numbers + (size_t)i * span_stride + n, span_stride, weights_of(e.both_of_basis) + c,
                            both, steps(e.basis), sums);
          add_parts(sums, first + n, n, i, c);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) {
              store(rows + m * width + c + v * WIDTH, sums[m][v]);
              squares[m] += sums[m][v] * sums[m][v];
            }
        });
        sum_of_each(squares, scales + n * room + i);
      }
    });
    for (int n = 0; n < count; n++)
      for (int i = 0; i < asking_first; i++) {
        float* scale = scales + n * room + i;
        *scale = 1.0f / std::sqrt(*scale / e.dim + e.epsilon1);
      }
  }

  // The feed-forward's hidden values.
  void hidden_values(int first, int count) {
    over_rows(asking_first, [&]<int M>(int i) PINRANK_INLINE {
      for (int n = 0; n < count; n++)
        over_columns(e.hidden / WIDTH, [&]<int N>(int c) PINRANK_INLINE {
          Vector sums[M][N] = {}, bias[N];
          accumulate<GROUP>(span_numbers + (size_t)i * span_stride + n, span_stride,
                            weights_of(e.both_of_basis) + width + c, both, steps(e.basis), sums);
          add_parts(sums, first + n, n, i, width + c);
          load_each(e.hidden_bias1 + c, bias);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
              store_row(hidden_numbers + ((n * room + i + m) * e.hidden + c + v * WIDTH) / PER<Number>,
                        larger(sums[m][v] * scales[n * room + i + m] + bias[v], Vector{}));
        });
    });
  }

  // A candidate's rows before the second norm, in place, and the means and scales of that norm.
  void rows_after_feed_forward(int n) {
    float *rows = outputs + n * room * width, *mean = means + n * room, *scale = scales + n * room;
    over_rows(asking_first, [&]<int M>(int i) PINRANK_INLINE {
      Vector squares[M] = {}, totals[M] = {};
      over_columns(width / WIDTH, [&]<int N>(int c) PINRANK_INLINE {
        Vector sums[M][N] = {}, gain[N], bias[N];
        accumulate<1>(hidden_numbers + (n * room + i) * e.hidden / PER<Number>, e.hidden / PER<Number>,
                      weights_of(e.out_of_hidden1) + c, width, steps(e.hidden), sums);
        load_each(e.gain1 + c, gain);
        load_each(e.out_bias1 + c, bias);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
          for (int v = 0; v < N; v++) {
            float* row = rows + (size_t)(i + m) * width + c + v * WIDTH;
            const Vector total = load(row) * gain[v] * scale[i + m] + (sums[m][v] + bias[v]);
            store(row, total);
            if constexpr (PAIRS) store_row(output_rows + ((n * room + i + m) * width + c + v * WIDTH) / 2, total);
            squares[m] += total * total;
            totals[m] += total;
          }
      });
      sum_of_each(squares, scale + i);
      sum_of_each(totals, mean + i);
    });
    for (int i = 0; i < asking_first; i++) {
      mean[i] /= e.dim;
      scale[i] = 1.0f / std::sqrt(std::max(scale[i] / e.dim - mean[i] * mean[i], 0.0f) + e.epsilon2);
    }
  }

  // Divides what attention brings to rows i.. by their sums of weights, and adds their own and the candidate's part.
  template <int M, int N>
  inline PINRANK_INLINE void add_parts(Vector (&sums)[M][N], int candidate, int n, int i, int c) {
    Vector part[N];
    load_each(candidate_both + (size_t)candidate * both + c, part);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int v = 0; v < N; v++)
        sums[m][v] = sums[m][v] * shares[(i + m) * GROUP + n] +
                     (load(own_both + (size_t)(i + m) * both + c + v * WIDTH) + part[v]);
  }

  // The norm of the rows that are read, where there is no other layer.
  void outputs_of_first_layer(int count) {
    for (int n = 0; n < count; n++)
      for (int i = 0; i < asked; i++)
        for (int c = 0; c < width; c += WIDTH)
          store(read + ((size_t)n * asked + i) * width + c,
                normed(n, i, c) * load(e.gain4 + c) + load(e.shift4 + c));
  }

  // Numbers of the i-th output of layer 1 of the group's n-th candidate, without gain and shift.
  inline PINRANK_INLINE Vector normed(int n, int i, int c) const {
    return (load(outputs + ((size_t)n * room + i) * width + c) - means[n * room + i] * load(e.real + c)) *
           scales[n * room + i];
  }

  // Layer 2 for the rows that are read. A row's norm is its mean, scale, gain and shift; the maps of keys and values
  // leave out the mean of what they map.
  void last_layer(int count) {
    const int rows = count * asked;
    for (int n = 0; n < count; n++)
      for (int i = 0; i < asked; i++)
        for (int c = 0; c < width; c += WIDTH)
          store(asking + ((size_t)n * asked + i) * width + c, normed(n, i, c));
    map(asking, width, e.query_key2, width, e.query_key2_bias, queries, rows, e.dim);
    for (int n = 0; n < count; n++) attend(n);
    map(read, width, e.value_out2, width, e.value_out2_bias, attended, rows, e.dim);
    for (int i = 0; i < rows; i++)
      for (int c = 0; c < width; c += WIDTH) {
        float* row = attended + (size_t)i * width + c;
        store(row, load(row) + load(asking + (size_t)i * width + c) * load(e.gain2 + c));
      }
    normalise(attended, rows, width, e.dim, e.epsilon3, e.real, e.gain3, e.shift3);
    map(attended, width, e.hidden_of_row2, e.hidden, e.hidden_bias2, hidden, rows, e.dim);
    for (int i = 0; i < rows * e.hidden; i++) hidden[i] = std::max(hidden[i], 0.0f);
    map(hidden, e.hidden, e.out_of_hidden2, width, e.out_bias2, read, rows, e.hidden);
    for (int i = 0; i < rows * width; i++) read[i] += attended[i];
    normalise(read, rows, width, e.dim, e.epsilon4, e.real, e.gain4, e.shift4);
  }

  // The mean of the outputs of the group's n-th candidate that the attention of each of its asking rows makes.
  void attend(int n) {
    const float *of_candidate = outputs + (size_t)n * room * width, *scale = scales + n * room;
    const float* asks = queries + (size_t)n * asked * width;
    if constexpr (PAIRS)
      dot_products(row_pairs(asks, (size_t)asked * width, left), output_rows + n * room * width / 2, width / 2, scale,
                   attention, stride, asked, present);
    else
      dot_products(asks, of_candidate, width, scale, attention, stride, asked, present);
    exponentiate(attention, asked, stride, present);
    for (int i = 0; i < asked; i++) {
      float* row = attention + (size_t)i * stride;
      Vector total{};
      for (int j = 0; j < stride; j += WIDTH) total += load(row + j);
      const float share = 1.0f / sum(total);
      for (int j = 0; j < stride; j += WIDTH) store(row + j, load(row + j) * load(scale + j) * share);
      if (PAIRS && present % 2) row[present] = 0.0f;  // it makes a pair with the last one
    }
    float* mean = read + (size_t)n * asked * width;
    if constexpr (PAIRS) {
      for (int j = 0; j < present; j += 2)
        for (int c = 0; c < width; c += WIDTH)
          store(output_columns + (size_t)j / 2 * width + c,
                zipped(load(of_candidate + (size_t)j * width + c),
                       j + 1 < present ? load(of_candidate + (size_t)(j + 1) * width + c) : Vector{}));
      product(row_pairs(attention, (size_t)asked * stride, left), stride / 2, output_columns, width, nullptr, mean,
              width, asked, width, steps(present));
    } else {
      product(attention, stride, of_candidate, width, nullptr, mean, width, asked, width, present);
    }
  }

  // out[rows][to] = from[rows][depth] times an array of weights, plus the bias.
  void map(const float* from, int stride, const float* array, int to, const float* bias, float* out, int rows,
           int depth) {
    if constexpr (PAIRS)
      product(row_pairs(from, (size_t)rows * stride, left), stride / 2, weights_of(array), to, bias, out, to, rows, to,
              steps(depth));
    else
      product(from, stride, array, to, bias, out, to, rows, to, depth);
  }

  // Arrays of weights that only these products read hold their rows in pairs, 2k and 2k + 1, if `Number` does.
  static const Number* weights_of(const float* array) { return reinterpret_cast<const Number*>(array); }
  static int steps(int depth) { return (depth + PER<Number> - 1) / PER<Number>; }
  // Memory for `count` floats as numbers: the floats themselves, or pairs beside them.
  static Number* numbers(Arena& arena, float* floats, size_t count) {
    if constexpr (PAIRS)
      return reinterpret_cast<Number*>(arena.take((count + 1) / 2));
    else
      return floats;
  }

  const PinrankEncoder& e;
  const int width, both, columns, span_stride;
  int present = 0, asked = 0, asking_first = 0, stride = 0;
  const size_t basis_room;
  size_t room;
  int codes[PINRANK_LENGTH_MAX], position[PINRANK_LENGTH_MAX];
  float *embeddings, *pins, *own, *own_across, *own_queries, *own_both, *scores, *shared, *candidate_keys;
  float *candidate_in, *candidate, *candidate_both, *offsets, *weights, *spans, *mixture, *mixed;
  Number* weighted;
  float *basis, *alternating, *shares, *outputs, *scales, *means;
  float *asking, *queries, *attention, *read, *attended, *hidden;
  Number *shared_numbers, *span_numbers, *hidden_numbers;
  Number *left, *output_rows, *output_columns;  // only for pairs
};

// Encodes rows row_splits[r]..row_splits[r + 1] of candidates for each request r; returns 1 if out of memory.
template <typename Number>
int encode_requests(const PinrankEncoder& e, const int64_t* actions, const float* pins, const float* candidates,
                    const int32_t* row_splits, int requests, float* out) {
  float* memory = thread_memory(Encoding<Number>(e, Arena()).floats);
  if (!memory) return 1;
  Encoding<Number> encoding(e, Arena(memory));
  for (int r = 0; r < requests; r++) {
    const size_t first = row_splits[r];
    encoding.run(actions + (size_t)r * e.length, pins + (size_t)r * e.length * e.embedding,
                 candidates + first * e.embedding, row_splits[r + 1] - row_splits[r], out + first * e.rows * e.dim);
  }
  return 0;
}

}  // namespace
}  // namespace PINRANK_ISA
