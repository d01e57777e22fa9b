// Compares the candidates of one request with its user, its query and the pins of its sequence.
//
// The NumPy reference is model_store/model/similarities.py. Every sum is over the dimensions, one after the other, so
// that both give the same bits; several columns are summed at once.

#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "exports.h"

namespace {

constexpr int64_t NEWEST = 5;   // as in similarities.py
constexpr int64_t COLUMNS = 8;  // in a vector
// Sums of several vectors run beside each other: an addition takes four cycles, and one chain would wait.
constexpr int64_t VECTORS = 8, BLOCK = VECTORS * COLUMNS;
constexpr int64_t OUT_OF_MEMORY = -2;

// The vectors of one request, as similarities.py describes them.
struct Compared {
  const float* pins;         // [candidates, dim]
  const float* user;         // [dim]
  const float* query;        // [dim]
  const float* sequence;     // [length, dim]
  const int64_t* actions;    // [length]: the code of each action plus one, 0 past the end
  int64_t candidates, dim, length, kinds;
};

float product(const float* one, const float* other, int64_t dim) {
  float sum = one[0] * other[0];
  for (int64_t d = 1; d < dim; d++) sum += one[d] * other[d];
  return sum;
}

// Scales to length one; zeros stay zeros.
void to_unit(const float* vector, int64_t dim, float* unit) {
  const float length = std::sqrt(product(vector, vector, dim));
  for (int64_t d = 0; d < dim; d++) unit[d] = vector[d] / (length == 0 ? 1.0f : length);
}

typedef float Vector __attribute__((vector_size(COLUMNS * 4)));
typedef float Unaligned __attribute__((vector_size(COLUMNS * 4), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(COLUMNS * 4)));
typedef int32_t UnalignedMask __attribute__((vector_size(COLUMNS * 4), aligned(4), may_alias));

[[gnu::always_inline]] inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
[[gnu::always_inline]] inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

// The larger number; a NaN stays.
[[gnu::always_inline]] inline Vector larger(Vector most, Vector number) {
  return (number > most) | (number != number) ? number : most;
}

// The vectors with which a candidate is compared, one dimension after the other: those of the sequence, then the means of
// its groups, which are all of it, the newest, and those of each kind of action.
class Columns {
 public:
  explicit Columns(const Compared& of) : of_(of), length_(0) {
    while (length_ < of.length && of.actions[length_] != 0) length_++;
    groups_ = 2 + of.kinds;
    width_ = (length_ + groups_ + BLOCK - 1) / BLOCK * BLOCK;
    numbers_.assign(width_ * of.dim, 0.0f);
    members_.assign(groups_, 0);
    sums_.resize(width_);
    unit_.resize(of.dim);
    member_.assign(groups_ * width_, 0);
    for (int64_t l = 0; l < length_; l++) {
      to_unit(of.sequence + l * of.dim, of.dim, unit_.data());
      for (int64_t d = 0; d < of.dim; d++) numbers_[d * width_ + l] = unit_[d];
      add(0, l);
      if (l < NEWEST) add(1, l);
      if (of.actions[l] <= of.kinds) add(1 + of.actions[l], l);
    }
    for (int64_t group = 0; group < groups_; group++)
      for (int64_t d = 0; d < of.dim && members_[group] > 0; d++) mean(group, d) /= static_cast<float>(members_[group]);
  }

  // Writes the largest and the mean cosine of a candidate with each group; 0 for groups without members.
  [[gnu::always_inline]] inline void compare(const float* pin, float* found) {
    to_unit(pin, of_.dim, unit_.data());
    for (int64_t column = 0; column < width_; column += BLOCK) sum(column);
    for (int64_t group = 0; group < groups_; group++) {
      found[2 * group] = found[2 * group + 1] = 0;
      if (members_[group] == 0) continue;
      const Vector least = Vector{} - INFINITY;
      Vector most = least;
      const int32_t* member = member_.data() + group * width_;
      for (int64_t column = 0; column < length_; column += COLUMNS) {
        const Mask within = *reinterpret_cast<const UnalignedMask*>(member + column);
        most = larger(most, within ? load(sums_.data() + column) : least);
      }
      float largest = most[0];
      for (int64_t i = 1; i < COLUMNS; i++) largest = most[i] > largest || most[i] != most[i] ? most[i] : largest;
      found[2 * group] = largest + 0.0f;  // zeros of both signs are equal, so their order must not matter
      found[2 * group + 1] = sums_[length_ + group];
    }
  }

 private:
  // sums_[column..] = the products of a block of columns with the candidate.
  [[gnu::always_inline]] inline void sum(int64_t column) {
    Vector sums[VECTORS];
    const float* numbers = numbers_.data() + column;
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) sums[i] = load(numbers + i * COLUMNS) * unit_[0];
    for (int64_t d = 1; d < of_.dim; d++) {
      numbers += width_;
      const float number = unit_[d];
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; i++) sums[i] += load(numbers + i * COLUMNS) * number;
    }
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) store(sums_.data() + column + i * COLUMNS, sums[i]);
  }

  float& mean(int64_t group, int64_t d) { return numbers_[d * width_ + length_ + group]; }

  // Makes the pin `l`, whose vector is `unit_`, a member of a group. The first vector is not added to 0, which would make
  // 0 of -0.
  void add(int64_t group, int64_t l) {
    member_[group * width_ + l] = -1;
    const bool first = members_[group]++ == 0;
    for (int64_t d = 0; d < of_.dim; d++) mean(group, d) = first ? unit_[d] : mean(group, d) + unit_[d];
  }

  const Compared& of_;
  int64_t length_, groups_, width_;
  std::vector<float> numbers_, sums_, unit_;
  std::vector<int64_t> members_;  // of each group, how many
  std::vector<int32_t> member_;   // [groups][width]: all bits, if it is one
};

[[gnu::always_inline]] inline void compare_all(const Compared& of, float* found) {
  Columns columns(of);
  const int64_t width = of.length > 0 ? 6 + 2 * of.kinds : 2;
  for (int64_t n = 0; n < of.candidates; n++, found += width) {
    const float* pin = of.pins + n * of.dim;
    found[0] = product(pin, of.user, of.dim);
    found[1] = product(pin, of.query, of.dim);
    if (of.length > 0) columns.compare(pin, found + 2);
  }
}

void compare_portable(const Compared& of, float* found) { compare_all(of, found); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void compare_avx2(const Compared& of, float* found) { compare_all(of, found); }
#endif

using Compare = void (*)(const Compared&, float*);

Compare fastest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return compare_avx2;
#endif
  return compare_portable;
}

}  // namespace

// Writes [candidates, 6 + 2 * kinds] numbers, or [candidates, 2] if `length` is 0. Returns 0, or -2 if out of memory.
PINRANK_API int64_t pinrank_similarities(const Compared* of, float* found) {
  static const Compare compare = fastest();
  try {
    compare(*of, found);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return 0;
}
