// Lookups in the near cache and admission to it, over arrays that NumPy allocated.
//
// `feature_client/cache_places.py` describes the arrays. Its class `NumpyPlaces` is the reference: every function here
// leaves the same bytes in them and returns the same rows. In a cache that is larger than the processor's, the time
// goes into waiting for memory, so every loop asks for the lines of later ids before it needs those of this one.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "features.h"

namespace {

constexpr int WAYS = 8;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, MIX = 0xC2B2AE3D27D4EB4F, MIX2 = 0xD6E8FEB86659FD93;
// How many ids ahead memory is asked for, and how many rows are found before they are copied.
constexpr int64_t AHEAD = 32, BLOCK = 128;
constexpr int64_t LINE = 64;

}  // namespace

// The class `_Struct` of cache_places.py.
struct NearCache {
  uint64_t* keys;
  double* read_s;
  uint8_t* rows;
  uint8_t* states;
  uint8_t* counters;
  int64_t row_bytes;
  uint64_t shift, mask, counter_shift;

  int64_t first_of(uint64_t id) const { return static_cast<int64_t>((id * GOLDEN >> shift) & mask) * WAYS; }
  uint8_t& one(uint64_t id) const { return counters[id * MIX >> counter_shift]; }
  uint8_t& other(uint64_t id) const { return counters[id * MIX2 >> counter_shift]; }

  // How often this id was requested, or others that share its counters.
  uint8_t asked(uint64_t id) const {
    const uint8_t a = one(id), b = other(id);
    return a < b ? a : b;
  }
};

namespace {

void prefetch_set(const NearCache& cache, int64_t first) {
  __builtin_prefetch(cache.keys + first);
  __builtin_prefetch(cache.read_s + first);
}

void prefetch_counters(const NearCache& cache, uint64_t id) {
  __builtin_prefetch(&cache.one(id));
  __builtin_prefetch(&cache.other(id));
}

void prefetch_row(const NearCache& cache, int64_t place) {
  const uint8_t* row = cache.rows + place * cache.row_bytes;
  for (int64_t byte = 0; byte < cache.row_bytes; byte += LINE) __builtin_prefetch(row + byte);
  __builtin_prefetch(row + cache.row_bytes - 1);
  __builtin_prefetch(cache.states + place);
}

// The place of this id, or -1 if its row is not cached or was read at `oldest_s` or before.
int64_t find(const NearCache& cache, uint64_t id, double oldest_s) {
  const int64_t first = cache.first_of(id);
  const uint64_t* keys = cache.keys + first;
  unsigned equal = 0;
  for (int way = 0; way < WAYS; ++way) equal |= static_cast<unsigned>(keys[way] == id) << way;
  if (!equal) return -1;
  const int64_t place = first + __builtin_ctz(equal);
  return cache.read_s[place] > oldest_s ? place : -1;
}

// Count one request for each id. `asked` has room for one byte per id: all counts are read before one is raised, so an
// id that is repeated counts once, and the order of the ids does not matter.
void note(const NearCache& cache, const uint64_t* ids, int64_t count, uint8_t* asked) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) prefetch_counters(cache, ids[i + AHEAD]);
    const uint8_t before = cache.asked(ids[i]);
    asked[i] = static_cast<uint8_t>(before + (before < 255));
  }
  for (int64_t i = 0; i < count; ++i) {
    // The higher of the two counters includes other ids and stays as it is.
    uint8_t &one = cache.one(ids[i]), &other = cache.other(ids[i]);
    if (one < asked[i]) one = asked[i];
    if (other < asked[i]) other = asked[i];
  }
}

}  // namespace

// Look up ids, and count a request for each if `noted` is not 0. Returns how many are absent.
// `out` has room for `count` rows, then a state for each, then 0 or 1 for each, whether it is absent, then one byte of
// working memory for each. Absent rows and their states are zeros.
PINRANK_API int64_t pinrank_near_cache_look_up(const NearCache* cache, const uint64_t* ids, int64_t count,
                                               double oldest_s, int noted, uint8_t* out) {
  uint8_t *states = out + count * cache->row_bytes, *absent = states + count, *asked = absent + count;
  int64_t places[BLOCK], misses = 0;
  for (int64_t i = 0; i < count && i < AHEAD; ++i) prefetch_set(*cache, cache->first_of(ids[i]));
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t length = count - start < BLOCK ? count - start : BLOCK;
    for (int64_t i = 0; i < length; ++i) {
      if (start + i + AHEAD < count) prefetch_set(*cache, cache->first_of(ids[start + i + AHEAD]));
      places[i] = find(*cache, ids[start + i], oldest_s);
      if (places[i] >= 0) prefetch_row(*cache, places[i]);
    }
    for (int64_t i = 0; i < length; ++i) {
      const bool found = places[i] >= 0;
      uint8_t* row = out + (start + i) * cache->row_bytes;
      if (found)
        std::memcpy(row, cache->rows + places[i] * cache->row_bytes, static_cast<size_t>(cache->row_bytes));
      else
        std::memset(row, 0, static_cast<size_t>(cache->row_bytes));
      states[start + i] = found ? cache->states[places[i]] : 0;
      absent[start + i] = !found;
      misses += !found;
    }
  }
  if (noted) note(*cache, ids, count, asked);
  return misses;
}

// Cache rows that were read at `now_s`, one after the other; a cached row read before `stale_s` may always be replaced.
// Row i begins at rows + i * row_stride. Returns the number of evictions.
PINRANK_API int64_t pinrank_near_cache_put(const NearCache* cache, const uint64_t* ids, int64_t count,
                                           const uint8_t* rows, int64_t row_stride, const uint8_t* states,
                                           double now_s, double stale_s) {
  int64_t evictions = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) {
      prefetch_set(*cache, cache->first_of(ids[i + AHEAD]));
      prefetch_counters(*cache, ids[i + AHEAD]);
    }
    const int64_t first = cache->first_of(ids[i]);
    // The preferred place is the id's own or the first empty one, then that of the least requested row.
    int64_t place = -1;
    int least = 256;
    for (int64_t at = first; at < first + WAYS && least >= 0; ++at) {
      const bool own_or_empty = cache->keys[at] == ids[i] || cache->read_s[at] == -HUGE_VAL;
      const int requests = own_or_empty ? -1 : cache->asked(cache->keys[at]);
      if (requests < least) {
        least = requests;
        place = at;
      }
    }
    const bool stale = cache->read_s[place] < stale_s;
    if (cache->asked(ids[i]) <= least && !stale) continue;
    evictions += least >= 0;
    cache->keys[place] = ids[i];
    std::memcpy(cache->rows + place * cache->row_bytes, rows + i * row_stride, static_cast<size_t>(cache->row_bytes));
    cache->states[place] = states[i];
    cache->read_s[place] = now_s;
  }
  return evictions;
}
