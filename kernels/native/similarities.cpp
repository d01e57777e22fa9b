// Compares the candidates of one request with its user, its query and the pins of its sequence.
//
// The NumPy reference is model_store/model/similarities.py. Every sum is over the dimensions, one after the other, so
// that both give the same bits; several candidates are compared at once, one in each lane of a vector.

#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "exports.h"

namespace {

constexpr int64_t NEWEST = 5;  // as in similarities.py
// Sums of several entries run beside each other: an addition takes four cycles, and one chain would wait.
constexpr int64_t BLOCK = 8;
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

template <int64_t LANES>
class Comparison {
  typedef float Vector __attribute__((vector_size(LANES * 4)));
  typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

 public:
  explicit Comparison(const Compared& of) : of_(of), width_(of.length > 0 ? 6 + 2 * of.kinds : 2), turned_(of.dim * LANES) {}

  [[gnu::always_inline]] inline void run(float* found) {
    if (of_.length > 0) prepare();
    for (int64_t n = 0; n < of_.candidates; n += LANES) {
      const int64_t count = of_.candidates - n < LANES ? of_.candidates - n : LANES;
      turn(of_.pins + n * of_.dim, count);
      compare(count, found + n * width_);
    }
  }

 private:
  [[gnu::always_inline]] static inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
  [[gnu::always_inline]] static inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
  [[gnu::always_inline]] inline Vector turned(int64_t d) const { return load(turned_.data() + d * LANES); }

  // turned(d) = dimension d of these vectors, one in each lane; lanes without one hold 0.
  [[gnu::always_inline]] inline void turn(const float* vectors, int64_t count) {
    for (int64_t lane = 0; lane < LANES; lane++)
      for (int64_t d = 0; d < of_.dim; d++)
        turned_[d * LANES + lane] = lane < count ? vectors[lane * of_.dim + d] : 0.0f;
  }

  [[gnu::always_inline]] inline Vector product(const float* other) const {
    Vector sum = turned(0) * other[0];
    for (int64_t d = 1; d < of_.dim; d++) sum += turned(d) * other[d];
    return sum;
  }

  // What scales the turned vectors to length one; zeros stay zeros.
  [[gnu::always_inline]] inline Vector divisor() const {
    Vector squares = turned(0) * turned(0);
    for (int64_t d = 1; d < of_.dim; d++) squares += turned(d) * turned(d);
    float lengths[LANES];
    store(lengths, squares);
    for (int64_t lane = 0; lane < LANES; lane++) lengths[lane] = lengths[lane] == 0 ? 1.0f : std::sqrt(lengths[lane]);
    return load(lengths);
  }

  // Collects what candidates are compared with, the entries: the vectors of the sequence, scaled to length one, and then
  // the means of its groups, which are all of it, the newest, and those of each kind of action.
  [[gnu::always_inline]] inline void prepare() {
    const int64_t dim = of_.dim;
    while (length_ < of_.length && of_.actions[length_] != 0) length_++;
    members_.resize(2 + of_.kinds);
    entries_ = (length_ + groups() + BLOCK - 1) / BLOCK * BLOCK;
    units_.assign(entries_ * dim, 0.0f);
    products_.resize(entries_ * LANES);
    for (int64_t first = 0; first < length_; first += LANES) {
      const int64_t count = length_ - first < LANES ? length_ - first : LANES;
      turn(of_.sequence + first * dim, count);
      float by[LANES];
      store(by, divisor());
      for (int64_t lane = 0; lane < count; lane++) {
        const float* vector = of_.sequence + (first + lane) * dim;
        for (int64_t d = 0; d < dim; d++) units_[(first + lane) * dim + d] = vector[d] / by[lane];
      }
    }
    for (int64_t l = 0; l < length_; l++) {
      members_[0].push_back(l);
      if (l < NEWEST) members_[1].push_back(l);
      if (of_.actions[l] <= of_.kinds) members_[1 + of_.actions[l]].push_back(l);
    }
    for (int64_t group = 0; group < groups(); group++) {
      float* mean = units_.data() + (length_ + group) * dim;
      for (int64_t place = 0; place < members(group); place++) {
        const float* unit = units_.data() + members_[group][place] * dim;
        // The first vector is not added to 0, which would make 0 of -0.
        for (int64_t d = 0; d < dim; d++) mean[d] = place == 0 ? unit[d] : mean[d] + unit[d];
      }
      for (int64_t d = 0; d < dim && members(group) > 0; d++) mean[d] /= static_cast<float>(members(group));
    }
  }

  // Writes the columns of the turned candidates.
  [[gnu::always_inline]] inline void compare(int64_t count, float* found) {
    write(found, count, 0, product(of_.user));
    write(found, count, 1, product(of_.query));
    if (of_.length == 0) return;
    const Vector by = divisor();
    for (int64_t d = 0; d < of_.dim; d++) store(turned_.data() + d * LANES, turned(d) / by);
    for (int64_t entry = 0; entry < entries_; entry += BLOCK) multiply(entry);
    for (int64_t group = 0; group < groups(); group++) {
      Vector most = Vector{} - INFINITY;
      for (const int64_t entry : members_[group]) {
        const Vector number = load(products_.data() + entry * LANES);
        most = (number > most) | (number != number) ? number : most;  // a NaN stays
      }
      // Zeros of both signs are equal, so their order must not matter.
      write(found, count, 2 + 2 * group, members(group) > 0 ? most + 0.0f : Vector{});
      write(found, count, 3 + 2 * group, members(group) > 0 ? load(products_.data() + (length_ + group) * LANES) : Vector{});
    }
  }

  // products_[entry..] = the products of a block of entries with the turned candidates.
  [[gnu::always_inline]] inline void multiply(int64_t entry) {
    Vector sums[BLOCK];
    const float* units = units_.data() + entry * of_.dim;
#pragma GCC unroll 8
    for (int64_t i = 0; i < BLOCK; i++) sums[i] = turned(0) * units[i * of_.dim];
    for (int64_t d = 1; d < of_.dim; d++) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < BLOCK; i++) sums[i] += turned(d) * units[i * of_.dim + d];
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < BLOCK; i++) store(products_.data() + (entry + i) * LANES, sums[i]);
  }

  [[gnu::always_inline]] inline void write(float* found, int64_t count, int64_t column, Vector numbers) const {
    float by_lane[LANES];
    store(by_lane, numbers);
    for (int64_t lane = 0; lane < count; lane++) found[lane * width_ + column] = by_lane[lane];
  }

  int64_t groups() const { return static_cast<int64_t>(members_.size()); }
  int64_t members(int64_t group) const { return static_cast<int64_t>(members_[group].size()); }

  const Compared& of_;
  const int64_t width_;
  int64_t length_ = 0, entries_ = 0;
  std::vector<float> turned_;                  // [dim, LANES]
  std::vector<float> units_;                   // [entries, dim]
  std::vector<float> products_;                // [entries, LANES]
  std::vector<std::vector<int64_t>> members_;  // of each group, its entries
};

void compare_portable(const Compared& of, float* found) { Comparison<4>(of).run(found); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void compare_avx2(const Compared& of, float* found) { Comparison<8>(of).run(found); }
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
