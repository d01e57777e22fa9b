// Reads the long field of a request without an object per number: the candidates' ids.

#include <cstdint>
#include <cstring>
#include <vector>

#include "exports.h"

namespace {

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

// Copies `count` 8-byte little-endian numbers, and returns whether two of them are equal. `multiplier` is odd and random,
// so that no choice of numbers makes many of them collide.
bool copy_ids(const uint8_t* from, int64_t count, uint64_t multiplier, uint64_t* ids) {
  int bits = 4;
  while ((int64_t)1 << bits < 2 * count) bits++;
  // Places hold the position of an id plus one; 0 is empty. The memory is the thread's own from call to call.
  thread_local std::vector<uint32_t> table;
  table.assign((size_t)1 << bits, 0);
  const uint64_t mask = ((uint64_t)1 << bits) - 1;
  bool equal = false;
  for (int64_t i = 0; i < count; i++) {
    uint64_t id = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    std::memcpy(&id, from + 8 * i, 8);
#else
    for (int b = 7; b >= 0; b--) id = id << 8 | from[8 * i + b];
#endif
    ids[i] = id;
    uint64_t place = id * multiplier >> (64 - bits);
    while (table[place] != 0 && ids[table[place] - 1] != id) place = (place + 1) & mask;
    equal |= table[place] != 0;
    table[place] = (uint32_t)(i + 1);
  }
  return equal;
}

// Finds the only occurrence of a packed field of 8-byte numbers among a message's top-level fields.
//
// Returns the number of numbers; where the field starts, where its numbers start and where it ends go to `places`.
// Returns -1 if the field is absent, occurs twice or in another form, or if the message is malformed.
int64_t packed_words(const uint8_t* message, int64_t size, uint32_t field, int64_t* places) {
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

}  // namespace

// Reads the only occurrence of a packed field of 8-byte ids among a message's top-level fields.
//
// `ids` has room for `size` / 8. Returns how many there are; places[0] is where the field starts, places[1] where it
// ends, and places[2] whether two ids are equal. Returns -1 if the field is absent, occurs twice or in another form, or
// if the message is malformed: a protobuf parser must then read the message.
PINRANK_API int64_t pinrank_read_ids(const uint8_t* message, int64_t size, uint32_t field, uint64_t multiplier,
                                     uint64_t* ids, int64_t* places) {
  int64_t found[3];
  const int64_t count = packed_words(message, size, field, found);
  if (count == NOT_FOUND) return NOT_FOUND;
  places[0] = found[0];
  places[1] = found[2];
  places[2] = copy_ids(message + found[1], count, multiplier, ids);
  return count;
}
