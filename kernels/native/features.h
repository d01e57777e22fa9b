// What reads features, group by group: values.cpp and near_cache.cpp define it, fetch.cpp calls it for a whole request.

#pragma once

#include <cstdint>

#include "exports.h"

struct RowLayout;
struct NearCache;

// The bytes of an event: the pin's id, the time, the event's id, then the codes of the action and the surface.
constexpr int64_t EVENT = 26, TIME = 8, ACTION = 24, SURFACE = 25;

PINRANK_API void pinrank_decode_row(const RowLayout* layout, const uint8_t* value, int64_t size, uint8_t* row);
PINRANK_API void pinrank_newest_events(const uint8_t* fingerprint, uint64_t actions, uint64_t surfaces, uintptr_t value,
                                       int64_t size, int64_t latest_ms, int64_t length, uint8_t* events,
                                       int64_t* found);
PINRANK_API int64_t pinrank_near_cache_look_up(const NearCache* cache, const uint64_t* ids, int64_t count,
                                               double oldest_s, int noted, uint8_t* out);
