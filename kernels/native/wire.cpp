// Reads the long field of a request without an object per number: the candidates' ids.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exports.h"

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;  // 2^64 over the golden ratio (Knuth, TAOCP 6.4)
constexpr int64_t NOT_FOUND = -1;

// Reads a base-128 varint. Returns false at the end of the message or after ten bytes.
bool varint(const uint8_t* message, int64_t size, int64_t* at, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 70 && *at < size; shift += 7) {
    const uint8_t byte = message[(*at)++];
    if (shift == 63 && byte > 1) return false;  // more than 64 bits
    *value |= (uint64_t)(byte & 0x7F) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

bool sorted_has_equal(const uint64_t* ids, int64_t count) {
  std::vector<uint64_t> sorted(ids, ids + count);
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
}

}  // namespace

// Finds the only occurrence of a packed field of 8-byte numbers among a message's top-level fields.
//
// Returns the number of numbers; where the field starts, where its numbers start and where it ends go to `places`.
// Returns -1 if the field is absent, occurs twice or in another form, or if the message is malformed: a protobuf parser
// must then read the message.
PINRANK_API int64_t pinrank_packed_words(const uint8_t* message, int64_t size, uint32_t field, int64_t* places) {
  int64_t at = 0, count = NOT_FOUND;
  while (at < size) {
    const int64_t start = at;
    uint64_t tag, length = 0;
    if (!varint(message, size, &at, &tag) || tag > UINT32_MAX || tag >> 3 == 0) return NOT_FOUND;
    switch (tag & 7) {
      case 0:
        if (!varint(message, size, &at, &length)) return NOT_FOUND;
        length = 0;
        break;
      case 1:
        length = 8;
        break;
      case 2:
        if (!varint(message, size, &at, &length)) return NOT_FOUND;
        break;
      case 5:
        length = 4;
        break;
      default:
        return NOT_FOUND;
    }
    if (length > (uint64_t)(size - at)) return NOT_FOUND;
    if (tag >> 3 == field) {
      if (count != NOT_FOUND || (tag & 7) != 2 || length % 8 != 0) return NOT_FOUND;
      count = (int64_t)length / 8;
      places[0] = start;
      places[1] = at;
      places[2] = at + (int64_t)length;
    }
    at += (int64_t)length;
  }
  return count;
}

// Copies `count` 8-byte little-endian numbers, and returns 1 if two of them are equal, else 0.
PINRANK_API int pinrank_copy_ids(const uint8_t* from, int64_t count, uint64_t* ids) {
  for (int64_t i = 0; i < count; i++) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    std::memcpy(ids + i, from + 8 * i, 8);
#else
    uint64_t id = 0;
    for (int b = 7; b >= 0; b--) id = id << 8 | from[8 * i + b];
    ids[i] = id;
#endif
  }
  int bits = 4;
  while ((int64_t)1 << bits < 2 * count) bits++;
  // Places hold the position of an id plus one; 0 is empty. The memory is the thread's own from call to call.
  thread_local std::vector<uint32_t> table;
  table.assign((size_t)1 << bits, 0);
  const uint64_t mask = ((uint64_t)1 << bits) - 1;
  int64_t probes = 0;
  for (int64_t i = 0; i < count; i++) {
    uint64_t place = ids[i] * GOLDEN >> (64 - bits);
    while (table[place] != 0) {
      if (ids[table[place] - 1] == ids[i]) return 1;
      // Ids that a stranger chose to collide must not hold up the server.
      if (++probes > 16 * count) return sorted_has_equal(ids, count);
      place = (place + 1) & mask;
    }
    table[place] = (uint32_t)(i + 1);
  }
  return 0;
}
