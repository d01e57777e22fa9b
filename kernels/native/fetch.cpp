// The features of one request from its user's stored values and the near caches: what `feature_client/fetch.py` does
// with a call for each group, in one.

#include <cstdint>
#include <cstring>

#include "features.h"
#include "sources.h"

namespace {

int64_t address_of(const void* at) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at)); }

int64_t in_words(int64_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

// A user group: how its rows are stored, and their bytes. A pin group: its near cache, and the bytes of its rows.
struct UserGroup {
  const RowLayout* layout;
  int64_t row_bytes;
};

struct PinGroup {
  const NearCache* cache;
  int64_t row_bytes;
};

// The class `_Plan` of packed_fetch.py.
struct FetchPlan {
  const UserGroup* users;
  int64_t user_count;
  const PinGroup* pins;
  int64_t pin_count;
  const uint8_t* fingerprint;  // of the sequence; null if the model reads none
  uint64_t actions, surfaces;
  int64_t length;
};

// What a request asks for. Then come, for each pin group, a `Lookup`, and the size of each value, negative if absent.
struct FetchAsk {
  int64_t latest_ms, candidates, has_query;
  uint64_t query;
};

struct Lookup {
  double oldest_s;
  int64_t noted;
};

// What was found. Then come, for each pin group, how many of its rows are absent.
struct FetchFound {
  int64_t events, future, sequence;
  int64_t flawed;  // whether anything is missing, foreign, or was ignored
};

// Decode the values of the user (one for each user group, then the sequence), look up the candidates, the pins of the
// newest events and the query pin in every group's cache, and return how many rows are absent in all caches together.
//
// `out` begins with the sources of assembly.cpp and the surface's index, which the caller sets. Then come what was
// found, the ids, the events, the users' rows, each with its state, and for each pin group what a lookup leaves.
// `values` are addresses. It has room for as many events as the plan's length.
PINRANK_API int64_t pinrank_fetch(const FetchPlan* plan, const uint8_t* ask_at, const uint8_t* const* values,
                                  const uint64_t* candidates, uint8_t* out) {
  FetchAsk ask;
  std::memcpy(&ask, ask_at, sizeof ask);
  const uint8_t* lookups = ask_at + sizeof ask;
  const uint8_t* sizes = lookups + plan->pin_count * static_cast<int64_t>(sizeof(Lookup));
  const auto size_of = [&](int64_t value) {
    int64_t size;
    std::memcpy(&size, sizes + 8 * value, sizeof size);
    return size;
  };

  Source* sources = reinterpret_cast<Source*>(out);
  uint8_t* at = out + (FIRST_GROUP + plan->user_count + 3 * plan->pin_count) * static_cast<int64_t>(sizeof(Source));
  sources[SURFACE_SOURCE] = {address_of(at), 0, 0, 1};
  at += 8;
  FetchFound& found = *reinterpret_cast<FetchFound*>(at);
  found = {};
  at += sizeof found;
  int64_t* absent = reinterpret_cast<int64_t*>(at);
  at += 8 * plan->pin_count;
  uint64_t* ids = reinterpret_cast<uint64_t*>(at);
  at += 8 * (ask.candidates + plan->length + 1);

  uint8_t* events = at;
  at += in_words(EVENT * plan->length);
  if (plan->fingerprint) {
    int64_t events_found[3];
    pinrank_newest_events(plan->fingerprint, plan->actions, plan->surfaces,
                          reinterpret_cast<uintptr_t>(values[plan->user_count]), size_of(plan->user_count),
                          ask.latest_ms, plan->length, events, events_found);
    found.events = events_found[0];
    found.future = events_found[1];
    found.sequence = events_found[2];
  }
  sources[ACTIONS_SOURCE] = {address_of(events + ACTION), 0, EVENT, found.events};
  bool flawed = found.future || found.sequence;

  Source* source = sources + FIRST_GROUP;
  for (int64_t i = 0; i < plan->user_count; i++) {
    const UserGroup& group = plan->users[i];
    pinrank_decode_row(group.layout, values[i], size_of(i), at);
    flawed |= at[group.row_bytes] != 0;
    *source++ = {address_of(at), 0, 0, 1};
    at += in_words(group.row_bytes + 1);
  }

  std::memcpy(ids, candidates, static_cast<size_t>(8 * ask.candidates));
  int64_t count = ask.candidates;
  for (int64_t i = 0; i < found.events; i++) std::memcpy(ids + count++, events + i * EVENT, 8);
  if (ask.has_query) ids[count++] = ask.query;

  int64_t absent_in_all = 0;
  for (int64_t i = 0; i < plan->pin_count; i++) {
    const PinGroup& group = plan->pins[i];
    Lookup lookup;
    std::memcpy(&lookup, lookups + i * static_cast<int64_t>(sizeof lookup), sizeof lookup);
    absent[i] = pinrank_near_cache_look_up(group.cache, ids, count, lookup.oldest_s, lookup.noted != 0, at);
    absent_in_all += absent[i];
    const uint8_t* states = at + count * group.row_bytes;
    for (int64_t pin = 0; pin < count; pin++) flawed |= states[pin] != 0;
    const int64_t first = address_of(at), bytes = group.row_bytes, pins = ask.candidates + found.events;
    *source++ = {first, 0, bytes, ask.candidates};
    *source++ = {first + ask.candidates * bytes, 0, bytes, found.events};
    *source++ = {first + pins * bytes, 0, bytes, ask.has_query && states[pins] == 0};
    at += in_words(count * (bytes + 3));
  }
  found.flawed = flawed;
  return absent_in_all;
}
