// Where the rows lie that the tensors of a request are made of: fetch.cpp and Python write it, assembly.cpp reads it.

#pragma once

#include <cstdint>

// Rows of bytes: of the candidates, the events' pins, the query pin, the user, or of one number. `place` is an address,
// or the position in the request's block, which holds the sources and then the bytes of the short ones.
struct Source {
  int64_t place, in_block, stride, count;
};

// The order of the sources: the surface's index, the actions, each user group, then three for each pin group.
enum SourceOrder : int64_t { SURFACE_SOURCE, ACTIONS_SOURCE, FIRST_GROUP };
