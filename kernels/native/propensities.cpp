// How probable answers were, given how their surface explores: `Explorer.propensities` for many answers in one call.
//
// The NumPy reference is in model_store/exploration/weights.py, orders.py, plackett_luce.py and regret.py. Which orders
// are equal, and which of them are within the bound on regret, follows from the same bits as there: this file performs
// the same operations in the same order and is compiled without fused multiply-adds.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "exports.h"
#include "order_keys.h"

// How a surface explores: by arms, or, with none, by orders of the best. Not owned, read-only.
struct PinrankPolicy {
  int64_t arms, parties, best;
  double share, regret_max, temperature, floor;
  const double* weights;  // [1 + arms][parties]: the tuned ones, then those of each arm
  const double* chances;  // [1 + arms]: that a request gets the order by these weights
};

// One answer, as model_store/exploration/propensities.py packs it.
struct PinrankAnswer {
  const PinrankPolicy* policy;
  const double* party_utilities;  // [rows][parties]
  const int64_t* order;           // [returned], places in the request
  const double* discounts;        // [returned]
  int64_t rows, returned;
};

namespace {

constexpr int BEST_MAX = 8;      // as in orders.py
constexpr double GAP_MAX = 60;   // as in plackett_luce.py
constexpr uint64_t NOT_FINITE = 0xffffffffu;

// Works on one answer after the other, in memory that it keeps.
class Calculation {
 public:
  // Writes the probability of the whole order, and of each pin at its position. Returns false if `order` does not hold
  // 1 to `rows` places of the request, each at most once.
  bool run(const PinrankAnswer& answer, double* whole, double* positions) {
    of_ = answer;
    if (!list_rows()) return false;
    list_columns();
    const PinrankPolicy& policy = *of_.policy;
    value_.resize(of_.rows);
    tuned_.resize(std::min(of_.rows, std::max(of_.returned, policy.best)));
    arrange(policy.weights, tuned_, value_.data());
    double sum = 0;
    for (int64_t k = 0; k < of_.returned; k++) sum += std::fabs(of_.discounts[k] * value_of(tuned_[k]));
    regret_max_ = policy.regret_max * sum;
    *whole = policy.arms > 0 ? by_arms(positions) : by_orders(positions);
    // Without what rounding put above 1.
    *whole = std::min(1.0, *whole);
    for (int64_t k = 0; k < of_.returned; k++) positions[k] = std::min(1.0, positions[k]);
    return true;
  }

 private:
  // Lists all rows, those of the answer first: orders by other weights are close to it.
  bool list_rows() {
    if (of_.returned < 1 || of_.returned > of_.rows) return false;
    listed_.assign(of_.rows, 0);
    rows_.clear();
    for (int64_t k = 0; k < of_.returned; k++) {
      const int64_t row = of_.order[k];
      if (row < 0 || row >= of_.rows || listed_[row]) return false;
      listed_[row] = 1;
      rows_.push_back(static_cast<uint32_t>(row));
    }
    for (int64_t row = 0; row < of_.rows; row++)
      if (!listed_[row]) rows_.push_back(static_cast<uint32_t>(row));
    return true;
  }

  // Copies the parties' utilities of the listed rows, one party after the other, so that a processor takes several rows
  // at once.
  void list_columns() {
    const int64_t parties = of_.policy->parties;
    columns_.resize(parties * rows_.size());
    for (size_t i = 0; i < rows_.size(); i++)
      for (int64_t p = 0; p < parties; p++) columns_[p * rows_.size() + i] = of_.party_utilities[rows_[i] * parties + p];
  }

  // Fills `best` with the best by some weights, ascending: above, where a utility sorts, below, its row. Those that are
  // not finite sink to the end; equal ones are in the order of rows. `value`, if it is set, gets each row's utility, 0 if
  // it is not finite.
  void arrange(const double* weights, std::vector<uint64_t>& best, double* value) {
    const size_t rows = rows_.size();
    sums_.assign(rows, 0);
    for (int64_t p = 0; p < of_.policy->parties; p++) {
      const double* utilities = columns_.data() + p * rows;
      const double weight = weights[p];
      if (p == 0)  // not added to 0, which would make 0 of -0
        for (size_t i = 0; i < rows; i++) sums_[i] = utilities[i] * weight;
      else
        for (size_t i = 0; i < rows; i++) sums_[i] += utilities[i] * weight;
    }
    keys_.resize(rows);
    for (size_t i = 0; i < rows; i++) {
      const float utility = static_cast<float>(sums_[i]);
      keys_[i] = (is_finite(utility) ? descending(utility) : NOT_FINITE) << 32 | rows_[i];
      if (value != nullptr) value[rows_[i]] = is_finite(utility) ? static_cast<double>(utility) : 0.0;
    }
    insert_keys(best);
  }

  // Inserts one key after the other into the best so far: quick, because they are nearly in order. If they are not, it
  // sorts them.
  void insert_keys(std::vector<uint64_t>& best) {
    const size_t top = best.size();
    size_t count = 0;
    int64_t moves = 8 * of_.rows;
    for (const uint64_t key : keys_) {
      if (count == top && key > best[top - 1]) continue;
      size_t place = count < top ? count++ : top - 1;
      for (; place > 0 && best[place - 1] > key; place--, moves--) best[place] = best[place - 1];
      best[place] = key;
      if (moves < 0) {
        const auto end = keys_.begin() + static_cast<int64_t>(top);
        std::nth_element(keys_.begin(), end, keys_.end());
        std::sort(keys_.begin(), end);
        std::copy(keys_.begin(), end, best.begin());
        return;
      }
    }
  }

  static uint32_t row_of(uint64_t key) { return static_cast<uint32_t>(key); }
  double value_of(uint64_t key) const { return value_[row_of(key)]; }
  bool answered(int64_t k, uint64_t key) const { return static_cast<int64_t>(row_of(key)) == of_.order[k]; }

  double by_arms(double* positions) {
    const PinrankPolicy& policy = *of_.policy;
    double whole = 0;
    std::fill_n(positions, of_.returned, 0.0);
    by_arm_.resize(of_.returned);
    for (int64_t arm = 0; arm <= policy.arms; arm++) {
      if (arm > 0) arrange(policy.weights + arm * policy.parties, by_arm_, nullptr);
      const auto& order = arm > 0 && regret(by_arm_) <= regret_max_ ? by_arm_ : tuned_;
      int64_t same = 0;
      for (int64_t k = 0; k < of_.returned; k++) {
        const bool here = answered(k, order[k]);
        positions[k] += policy.chances[arm] * here;  // without a branch, which would be mispredicted
        same += here;
      }
      if (same == of_.returned) whole += policy.chances[arm];
    }
    return whole;
  }

  double regret(const std::vector<uint64_t>& order) const {
    double sum = 0;
    for (int64_t k = 0; k < of_.returned; k++)
      sum += of_.discounts[k] * (value_of(tuned_[k]) - value_of(order[k]));
    return sum;
  }

  double by_orders(double* positions) const {
    const PinrankPolicy& policy = *of_.policy;
    bool same = true, same_after = true;
    const int m = drawn();
    const int64_t returned = of_.returned, open = std::min<int64_t>(m, returned);
    for (int64_t k = 0; k < returned; k++) {
      const bool here = answered(k, tuned_[k]);
      same &= here;
      if (k >= open) same_after &= here;
      positions[k] = here;
    }
    if (m < 2) return same;
    std::array<int, BEST_MAX> items;  // of each position: which of the m best is there, or -1
    bool known = true;
    for (int64_t k = 0; k < open; k++) {
      items[k] = -1;
      for (int item = 0; item < m; item++)
        if (answered(k, tuned_[item])) items[k] = item;
      known &= items[k] >= 0;
    }
    const auto weights = draw_weights(m);
    Chances chances = {};
    add_chances(weights, m, open, chances);
    for (int64_t k = 0; k < open; k++) {
      positions[k] *= 1 - policy.share;
      if (items[k] < 0) continue;
      const double here = policy.floor / m + (1 - policy.floor) * chances[k][items[k]];
      positions[k] += policy.share * here;
    }
    double whole = 0;
    if (known && same_after) {
      double evenly = 1;
      for (int64_t k = 0; k < open; k++) evenly *= static_cast<double>(m - k);
      whole = policy.floor / evenly + (1 - policy.floor) * order_chance(weights, m, items.data(), open);
    }
    return (1 - policy.share) * same + policy.share * whole;
  }

  // Returns how many of the best are drawn: the most whose worst order, the reverse, is within the bound.
  int drawn() const {
    int first = 0;
    const int64_t best = std::min<int64_t>(of_.policy->best, static_cast<int64_t>(tuned_.size()));
    while (first < best && tuned_[first] >> 32 != NOT_FINITE) first++;
    for (int m = first; m > 1; m--) {
      double worst = 0;
      for (int64_t k = 0, end = std::min<int64_t>(m, of_.returned); k < end; k++)
        worst += of_.discounts[k] * (value_of(tuned_[k]) - value_of(tuned_[m - 1 - k]));
      if (worst <= regret_max_) return m;
    }
    return 0;
  }

  using Weights = std::array<double, BEST_MAX>;
  using Chances = std::array<Weights, BEST_MAX>;  // of each position and item

  // The weights by which items are drawn, but for a factor, so that float64 holds them.
  Weights draw_weights(int m) const {
    Weights weights;
    weights[0] = 1;
    double gaps = 0;
    for (int item = 1; item < m; item++) {
      const double before = value_of(tuned_[item - 1]) / of_.policy->temperature;
      gaps += std::min(GAP_MAX, before - value_of(tuned_[item]) / of_.policy->temperature);
      weights[item] = std::exp(-gaps);
    }
    return weights;
  }

  // Adds up, over the sets of items that may be drawn first, the chance of each item that may follow.
  static void add_chances(const Weights& weights, int m, int64_t positions, Chances& chances) {
    std::array<double, 1 << BEST_MAX> drawn = {1};  // the chance that exactly a set's items are drawn first
    for (unsigned set = 0; set + 1 < 1u << m; set++) {
      const int k = std::popcount(set);
      if (k >= positions) continue;
      double left = 0;
      for (int item = 0; item < m; item++) left += set >> item & 1 ? 0.0 : weights[item];
      const double scale = drawn[set] / left;
      for (int item = 0; item < m; item++) {
        if (set >> item & 1) continue;
        const double next = scale * weights[item];
        chances[k][item] += next;
        drawn[set | 1u << item] += next;
      }
    }
  }

  static double order_chance(const Weights& weights, int m, const int* order, int64_t count) {
    double chance = 1;
    unsigned set = 0;
    for (int64_t k = 0; k < count; k++) {
      double left = 0;
      for (int item = 0; item < m; item++) left += set >> item & 1 ? 0.0 : weights[item];
      chance *= weights[order[k]] / left;
      set |= 1u << order[k];
    }
    return chance;
  }

  PinrankAnswer of_ = {};
  double regret_max_ = 0;
  std::vector<char> listed_;
  std::vector<uint32_t> rows_;
  std::vector<double> columns_, sums_;
  std::vector<double> value_;  // by the tuned weights, of each row
  std::vector<uint64_t> keys_, tuned_, by_arm_;
};

}  // namespace

// Writes the propensities of `count` answers: of their orders, and one after the other of their positions. Returns -1,
// the number of the first answer that `Calculation::run` does not take, or -2 if out of memory.
PINRANK_API int64_t pinrank_propensities(const PinrankAnswer* answers, int64_t count, double* orders,
                                         double* positions) {
  try {
    Calculation calculation;
    for (int64_t i = 0; i < count; positions += answers[i++].returned)
      if (!calculation.run(answers[i], orders + i, positions)) return i;
  } catch (const std::bad_alloc&) {
    return -2;
  }
  return -1;
}
