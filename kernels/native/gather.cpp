// Collects the pins of many answers, each in the order of its answer, into one array for each column of the log.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "exports.h"

namespace {

// One answer, as `impressions/writing/gathering.py` packs it: addresses and sizes.
struct Answer {
  const uint64_t* pin_ids;        // [rows]
  const int64_t* order;           // [returned], places in the request
  const float* utilities;         // [rows]
  const float* probabilities;     // [rows, heads]
  const double* party_utilities;  // [rows, parties]
  const double* attributes;       // [attribute_count, scored]
  int64_t rows, returned, scored, heads, parties, attribute_count;
};

template <typename T>
T* copied(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
  return to + count;
}

}  // namespace

// Write the pins of `count` answers, one answer after the other; the outputs have room for all of them.
// Returns -1, or the number of the first answer with a place outside its request.
PINRANK_API int64_t pinrank_gather(const Answer* answers, int64_t count, uint64_t* pin_ids, uint32_t* places,
                                   float* probabilities, double* party_utilities, double* attributes,
                                   float* utilities) {
  for (int64_t i = 0; i < count; i++) {
    const Answer& one = answers[i];
    for (int64_t k = 0; k < one.returned; k++) {
      const int64_t place = one.order[k];
      if (place < 0 || place >= one.rows) return i;
      *pin_ids++ = one.pin_ids[place];
      *places++ = static_cast<uint32_t>(place);
      *utilities++ = one.utilities[place];
      probabilities = copied(probabilities, one.probabilities + place * one.heads, one.heads);
      party_utilities = copied(party_utilities, one.party_utilities + place * one.parties, one.parties);
      for (int64_t a = 0; a < one.attribute_count; a++)
        *attributes++ = place < one.scored ? one.attributes[a * one.scored + place]
                                           : std::numeric_limits<double>::quiet_NaN();
    }
  }
  return -1;
}
