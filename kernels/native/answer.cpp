// From logits to the ordered answer: calibration, the parties' utilities, their weighted sum, the order, packed bytes.
//
// model_store/model/logistic.py, model_store/model/native_utility.py and server/request/scoring.py hold the arguments
// and the same computations in NumPy and numexpr. Results are equal to the bit, so this file performs the same
// operations in the same order and is compiled without fused multiply-adds. numexpr calls libm for its functions, and
// so does this file.

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "exports.h"
#include "order_keys.h"

static_assert(std::endian::native == std::endian::little, "stored rows and packed fields are little-endian");

// One surface's utility table. Registers hold the inputs, then the constants, then the parties' utilities, then
// intermediate results. Not owned, read-only.
struct PinrankSurface {
  int32_t heads, inputs, constants, parties, registers, steps;
  const int32_t* sources;   // [inputs]: the column of a head, or -1 - the place of an attribute
  const double* values;     // [constants]
  const int32_t* program;   // [steps][5]: an operation, the register of its result, those of three operands
  const double* weights;    // [parties]
  const float* slopes;      // [pattern]: of the heads, over and over
  const float* intercepts;  // [pattern]
  int64_t pattern;
};

// Where a pin attribute's value stands in the first row, the bytes from row to row, and its type.
struct PinrankAttribute {
  int64_t address, stride, type;
};

// One request; `attributes` follow in memory.
struct PinrankRequest {
  const float* logits;    // [scored][heads]
  const uint64_t* ids;    // [rows], of which the first `scored` have logits
  int64_t scored, rows, top;
  char* memory;           // of the answer: see `Answer`
};

namespace {

constexpr int64_t BLOCK = 64;

// Results. Padding is not needed: the widest numbers come first.
struct Answer {
  int64_t *non_finite, *order_ns;
  double* parties;       // [rows][parties]
  int64_t* order;        // [top]
  float* probabilities;  // [rows][heads]
  float* utilities;      // [rows]
  char* packed;

  Answer(const PinrankSurface& surface, const PinrankRequest& request) {
    non_finite = reinterpret_cast<int64_t*>(request.memory);
    order_ns = non_finite + 1;
    parties = reinterpret_cast<double*>(order_ns + 1);
    order = reinterpret_cast<int64_t*>(parties + request.rows * surface.parties);
    probabilities = reinterpret_cast<float*>(order + request.top);
    utilities = probabilities + request.rows * surface.heads;
    packed = reinterpret_cast<char*>(utilities + request.rows);
  }
};

// exp(x) for |x| <= 80: the constants and their source are in model_store/model/logistic.py.
inline float exp_of(float x) {
  const float shifted = x * 1.44269502f + 12582912.0f;
  const float halvings = shifted - 12582912.0f;
  const float rest = (x - halvings * 0.693359375f) - halvings * -2.12194442e-4f;
  float sum = 1.38145406e-3f * rest + 8.36874545e-3f;
  sum = sum * rest + 4.1668389e-2f;
  sum = sum * rest + 1.66665211e-1f;
  sum = sum * rest + 4.9999994e-1f;
  sum = sum * (rest * rest) + rest + 1.0f;
  return sum * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
}

// The pattern of slopes and intercepts spans several rows, so that whole vectors are filled.
void calibrate(const float* logits, int64_t count, const float* slopes, const float* intercepts, int64_t pattern,
               float* out) {
  for (int64_t start = 0; start < count; start += pattern) {
    const int64_t n = std::min(pattern, count - start);
    for (int64_t i = 0; i < n; i++) {
      const float logit = logits[start + i];
      float scaled = -(slopes[i] * logit + intercepts[i]);
      scaled = scaled < -80.0f ? -80.0f : scaled;
      scaled = scaled > 80.0f ? 80.0f : scaled;
      const float probability = 1.0f / (exp_of(scaled) + 1.0f);
      out[start + i] = is_finite(logit) ? probability : NAN;
    }
  }
}

// The operations of numexpr on float64 and on truth values, which are 0 or 1 here. Named as numexpr names them.
struct Operation {
  const char* name;
  void (*run)(double* to, const double* p, const double* q, const double* r, int64_t n);
};

// The result may replace an operand: each row is read before it is written.
#if defined(__clang__)
#define IN_PLACE
#else
#define IN_PLACE _Pragma("GCC ivdep")
#endif
#define EACH(expression)                                                                       \
  [](double* to, const double* p, const double* q, const double* r, int64_t n) {               \
    IN_PLACE for (int64_t i = 0; i < n; i++) {                                                 \
      [[maybe_unused]] const double x = p[i], y = q[i], z = r[i];                              \
      to[i] = expression;                                                                      \
    }                                                                                          \
  }

constexpr Operation OPERATIONS[] = {
    {"copy", EACH(x)},
    {"neg", EACH(-x)},
    {"add", EACH(x + y)},
    {"sub", EACH(x - y)},
    {"mul", EACH(x * y)},
    {"div", EACH(x / y)},
    {"mod", EACH(x - std::floor(x / y) * y)},
    {"pow", EACH(std::pow(x, y))},
    {"ones_like", EACH(1.0)},
    {"gt", EACH(x > y ? 1.0 : 0.0)},
    {"ge", EACH(x >= y ? 1.0 : 0.0)},
    {"eq", EACH(x == y ? 1.0 : 0.0)},
    {"ne", EACH(x != y ? 1.0 : 0.0)},
    {"and", EACH(x * y)},
    {"or", EACH(x > y ? x : y)},
    {"invert", EACH(1.0 - x)},
    {"where", EACH(x != 0.0 ? y : z)},
    {"sqrt", EACH(std::sqrt(x))},
    {"exp", EACH(std::exp(x))},
    {"expm1", EACH(std::expm1(x))},
    {"log", EACH(std::log(x))},
    {"log1p", EACH(std::log1p(x))},
    {"log10", EACH(std::log10(x))},
    {"absolute", EACH(std::fabs(x))},
    {"tanh", EACH(std::tanh(x))},
    {"sin", EACH(std::sin(x))},
    {"cos", EACH(std::cos(x))},
    {"floor", EACH(std::floor(x))},
    {"ceil", EACH(std::ceil(x))},
    {"arctan2", EACH(std::atan2(x, y))},
    {"maximum", EACH(std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y))},
    {"minimum", EACH(std::isnan(x) || std::isnan(y) ? NAN : std::fmin(x, y))},
};
#undef EACH
#undef IN_PLACE

// Stored rows are packed, so their numbers are not aligned.
template <class Number>
void read(double* to, const char* from, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    Number value;
    std::memcpy(&value, from + i * stride, sizeof value);
    to[i] = static_cast<double>(value);
  }
}

struct Type {
  const char* name;
  void (*read)(double* to, const char* from, int64_t stride, int64_t n);
};

constexpr Type TYPES[] = {
    {"float32", read<float>},    {"float64", read<double>}, {"int32", read<int32_t>},   {"int64", read<int64_t>},
    {"uint8", read<uint8_t>},    {"uint16", read<uint16_t>}, {"uint32", read<uint32_t>},
};

void load(double* to, int32_t source, const PinrankSurface& surface, const float* probabilities,
          const PinrankAttribute* attributes, int64_t start, int64_t n) {
  if (source >= 0) {
    const float* column = probabilities + start * surface.heads + source;
    for (int64_t i = 0; i < n; i++) to[i] = column[i * surface.heads];
  } else {
    const PinrankAttribute& attribute = attributes[-1 - source];
    const char* first = reinterpret_cast<const char*>(attribute.address);
    TYPES[attribute.type].read(to, first + start * attribute.stride, attribute.stride, n);
  }
}

// Evaluates all expressions, block by block, and their weighted sum if `utilities` is set.
void evaluate(const PinrankSurface& surface, const float* probabilities, const PinrankAttribute* attributes,
              int64_t rows, double* registers, double* parties, float* utilities) {
  const auto at = [&](int64_t number) { return registers + number * BLOCK; };
  for (int c = 0; c < surface.constants; c++) std::fill_n(at(surface.inputs + c), BLOCK, surface.values[c]);
  const int results = surface.inputs + surface.constants;
  for (int64_t start = 0; start < rows; start += BLOCK) {
    const int64_t n = std::min(BLOCK, rows - start);
    for (int i = 0; i < surface.inputs; i++)
      load(at(i), surface.sources[i], surface, probabilities, attributes, start, n);
    for (const int32_t *step = surface.program, *end = step + 5 * surface.steps; step < end; step += 5)
      OPERATIONS[step[0]].run(at(step[1]), at(step[2]), at(step[3]), at(step[4]), n);
    for (int p = 0; p < surface.parties; p++) {
      const double* result = at(results + p);
      for (int64_t i = 0; i < n; i++) parties[(start + i) * surface.parties + p] = result[i];
    }
    if (utilities == nullptr) continue;
    for (int64_t i = 0; i < n; i++) {
      double sum = at(results)[i] * surface.weights[0];
      for (int p = 1; p < surface.parties; p++) sum += at(results + p)[i] * surface.weights[p];
      utilities[start + i] = static_cast<float>(sum);
    }
  }
}

// Sorts stably by the upper 32 bits, one byte at a time (radix sort, least significant digit first); returns the
// sorted one of both arrays.
uint64_t* sorted(uint64_t* keys, uint64_t* spare, int64_t count) {
  uint32_t counts[4][256] = {};
  for (int64_t i = 0; i < count; i++)
    for (int digit = 0; digit < 4; digit++) counts[digit][keys[i] >> (32 + 8 * digit) & 255]++;
  for (int digit = 0; digit < 4; digit++) {
    const int shift = 32 + 8 * digit;
    uint32_t* places = counts[digit];
    if (places[keys[0] >> shift & 255] == count) continue;
    uint32_t place = 0;
    for (int value = 0; value < 256; value++) {
      const uint32_t here = places[value];
      places[value] = place;
      place += here;
    }
    for (int64_t i = 0; i < count; i++) spare[places[keys[i] >> shift & 255]++] = keys[i];
    std::swap(keys, spare);
  }
  return keys;
}

// Writes the positions of the best `top` of `rows` utilities, best first and non-finite ones last; both in the
// caller's order where equal. Returns how many of the first `scored` are not finite.
int64_t arrange(const float* utilities, int64_t scored, int64_t rows, int64_t top, uint64_t* keys, int64_t* order) {
  int64_t finite = 0;
  for (int64_t i = 0; i < scored; i++) {
    keys[finite] = static_cast<uint64_t>(descending(utilities[i])) << 32 | static_cast<uint64_t>(i);
    finite += is_finite(utilities[i]);
  }
  int64_t place = 0;
  if (finite > 0) {
    const uint64_t* found = sorted(keys, keys + rows, finite);
    for (const int64_t end = std::min(finite, top); place < end; place++) order[place] = found[place] & 0xffffffffu;
  }
  for (int64_t i = 0; place < top; i++)
    if (i >= scored || !is_finite(utilities[i])) order[place++] = i;
  return scored - finite;
}

// Writes the head of a packed field: its tag, then its length as a varint. Returns where the numbers go.
char* open_field(char* to, char tag, uint64_t length) {
  *to++ = tag;
  for (; length > 0x7f; length >>= 7) *to++ = static_cast<char>((length & 0x7f) | 0x80);
  *to++ = static_cast<char>(length);
  return to;
}

// Writes the fields `pin_ids` and `utilities` of pinrank.v1.RankResponse.
void pack(const PinrankRequest& request, const Answer& answer) {
  char* to = open_field(answer.packed, 0x0a, sizeof(uint64_t) * request.top);
  for (int64_t i = 0; i < request.top; i++, to += sizeof(uint64_t))
    std::memcpy(to, request.ids + answer.order[i], sizeof(uint64_t));
  to = open_field(to, 0x12, sizeof(float) * request.top);
  for (int64_t i = 0; i < request.top; i++, to += sizeof(float))
    std::memcpy(to, answer.utilities + answer.order[i], sizeof(float));
}

template <class Number>
std::unique_ptr<Number[]> allocated(int64_t count) {
  return std::unique_ptr<Number[]>(new (std::nothrow) Number[count]);
}

template <class Named, size_t COUNT>
const char* name_at(const Named (&list)[COUNT], int place) {
  return place >= 0 && place < static_cast<int>(COUNT) ? list[place].name : nullptr;
}

}  // namespace

// The names of operations and types by number; null after the last.
PINRANK_API const char* pinrank_operation_name(int number) { return name_at(OPERATIONS, number); }
PINRANK_API const char* pinrank_type_name(int number) { return name_at(TYPES, number); }

// Calibrates float32[count] logits; see `calibrate`.
PINRANK_API void pinrank_calibrate(const float* logits, int64_t count, const float* slopes, const float* intercepts,
                                   int64_t pattern, float* out) {
  calibrate(logits, count, slopes, intercepts, pattern, out);
}

// Evaluates the parties' utilities, float64[rows][parties]. Returns 0 on success, 1 if out of memory.
PINRANK_API int pinrank_party_utilities(const PinrankSurface* surface, const float* probabilities,
                                        const PinrankAttribute* attributes, int64_t rows, double* parties) {
  const auto registers = allocated<double>(surface->registers * BLOCK);
  if (!registers) return 1;
  evaluate(*surface, probabilities, attributes, rows, registers.get(), parties, nullptr);
  return 0;
}

// Answers a request of 0 < scored <= rows < 2^32 candidates. Returns 0 on success, 1 if out of memory.
PINRANK_API int pinrank_answer(const PinrankSurface* surface, const PinrankRequest* of) {
  using Clock = std::chrono::steady_clock;
  const PinrankRequest request = *of;
  const auto* attributes = reinterpret_cast<const PinrankAttribute*>(of + 1);
  const Answer answer(*surface, request);
  const auto registers = allocated<double>(surface->registers * BLOCK);
  const auto keys = allocated<uint64_t>(2 * request.rows);
  if (!registers || !keys) return 1;
  const int64_t scored = request.scored, unscored = request.rows - scored;
  calibrate(request.logits, scored * surface->heads, surface->slopes, surface->intercepts, surface->pattern,
            answer.probabilities);
  evaluate(*surface, answer.probabilities, attributes, scored, registers.get(), answer.parties, answer.utilities);
  std::fill_n(answer.probabilities + scored * surface->heads, unscored * surface->heads, NAN);
  std::fill_n(answer.parties + scored * surface->parties, unscored * surface->parties, NAN);
  std::fill_n(answer.utilities + scored, unscored, NAN);
  const auto start = Clock::now();
  *answer.non_finite = arrange(answer.utilities, scored, request.rows, request.top, keys.get(), answer.order);
  pack(request, answer);
  *answer.order_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  return 0;
}
