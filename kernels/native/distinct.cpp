// Which ids of a request are different, and which of them each place asks for.

#include <cstdint>
#include <cstring>

#include "exports.h"

// Find each of `count` ids among `known_count` ones that are known, all different, or else among the `distinct` new
// ones, which it writes in the order in which they first occur. `index[i]` is the place of `ids[i]` in the known ones
// followed by the new ones. `table` has 2^bits entries, at least twice as many as there are ids, and bits > 0.
// `multiplier` is odd and random, so that no choice of ids makes many of them collide.
// Returns how many ids are new.
PINRANK_API int64_t pinrank_distinct(const uint64_t* known, int64_t known_count, const uint64_t* ids, int64_t count,
                                     uint64_t multiplier, int32_t bits, int32_t* table, uint64_t* distinct,
                                     int64_t* index) {
  const int64_t mask = (int64_t{1} << bits) - 1;
  std::memset(table, 0xff, (mask + 1) * sizeof *table);  // every entry -1: empty
  int64_t fresh = 0;
  const auto id_at = [&](int64_t place) { return place < known_count ? known[place] : distinct[place - known_count]; };
  const auto find = [&](uint64_t id) {
    int64_t entry = static_cast<int64_t>((id * multiplier) >> (64 - bits));
    while (table[entry] >= 0 && id_at(table[entry]) != id) entry = (entry + 1) & mask;
    return table + entry;
  };
  for (int64_t i = 0; i < known_count; i++) *find(known[i]) = static_cast<int32_t>(i);
  for (int64_t i = 0; i < count; i++) {
    int32_t* entry = find(ids[i]);
    if (*entry < 0) {
      distinct[fresh] = ids[i];
      *entry = static_cast<int32_t>(known_count + fresh++);
    }
    index[i] = *entry;
  }
  return fresh;
}
