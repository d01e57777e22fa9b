// From what a feature store returned to rows and events. Nothing that a store returns is trusted: every length is
// checked before a byte is read, and numbers are copied out, because they lie at any address.

#include <cstdint>
#include <cstring>

#include "features.h"

namespace {

template <class Number>
Number load(const uint8_t* at) {
  Number number;
  std::memcpy(&number, at, sizeof number);
  return number;
}

// --- Replies of Redis ------------------------------------------------------------------------------------------------

enum Outcome : int32_t { COMPLETE, INCOMPLETE, UNUSUAL };

constexpr int64_t DIGITS_MAX = 8;  // lengths of up to 100 MB; the caller's limit is lower

// Read `expected` at `*at`, as far as it was received.
Outcome expect(const uint8_t* received, int64_t bytes, int64_t* at, const char* expected, int64_t length) {
  const int64_t there = bytes - *at < length ? bytes - *at : length;
  if (std::memcmp(received + *at, expected, there)) return UNUSUAL;
  if (there < length) return INCOMPLETE;
  *at += length;
  return COMPLETE;
}

// Read one value, `$<digits>\r\n<bytes>\r\n` or `$-1\r\n`, at `*at`. Only a complete value moves `*at`.
Outcome read_value(const uint8_t* received, int64_t bytes, int64_t size_max, int64_t* at, int64_t* start,
                   int64_t* size) {
  int64_t next = *at;
  if (next < bytes && received[next++] != '$') return UNUSUAL;
  if (next < bytes && received[next] == '-') {
    const Outcome nil = expect(received, bytes, &next, "-1\r\n", 4);
    if (nil == COMPLETE) *start = 0, *size = -1, *at = next;
    return nil;
  }
  const int64_t first = next;
  int64_t length = 0;
  for (; next < bytes && received[next] >= '0' && received[next] <= '9'; next++) {
    if (next - first == DIGITS_MAX) return UNUSUAL;
    length = 10 * length + (received[next] - '0');
  }
  if (next == bytes) return INCOMPLETE;
  if (next == first) return UNUSUAL;
  const Outcome line = expect(received, bytes, &next, "\r\n", 2);
  if (line != COMPLETE) return line;
  const int64_t stop = next + length;
  if (stop > size_max) return UNUSUAL;
  if (bytes < stop + 2) return INCOMPLETE;
  if (received[stop] != '\r' || received[stop + 1] != '\n') return UNUSUAL;
  *start = next, *size = length, *at = stop + 2;
  return COMPLETE;
}

// --- Rows ------------------------------------------------------------------------------------------------------------

enum CheckKind : int64_t { CODE, FLOAT };

}  // namespace

// What a field, or a block of adjacent floats, must be.
struct Check {
  int64_t kind, offset, width, count;
  uint64_t codes;  // valid codes are lower
};

struct RowLayout {
  uint64_t fingerprint;
  int64_t row_bytes, check_count;
  const Check* checks;
  const uint8_t* default_row;
};

namespace {

enum State : uint8_t { PRESENT, MISSING, FOREIGN };
constexpr int64_t FINGERPRINT = sizeof(uint64_t);

// Whether all exponents are below the one of infinities and NaNs.
template <class Bits>
bool finite(const uint8_t* at, int64_t count, Bits exponent) {
  bool all = true;
  for (int64_t i = 0; i < count; i++) all &= (load<Bits>(at + i * sizeof(Bits)) & exponent) != exponent;
  return all;
}

bool passes(const Check& check, const uint8_t* row) {
  const uint8_t* at = row + check.offset;
  if (check.kind == FLOAT) {
    if (check.width == 2) return finite<uint16_t>(at, check.count, 0x7c00);
    if (check.width == 4) return finite<uint32_t>(at, check.count, 0x7f800000);
    return finite<uint64_t>(at, check.count, 0x7ff0000000000000);
  }
  if (check.width == 1) return *at < check.codes;
  if (check.width == 2) return load<uint16_t>(at) < check.codes;
  return load<uint32_t>(at) < check.codes;
}

State read_row(const RowLayout& layout, const uint8_t* value, int64_t size) {
  if (size < 0) return MISSING;
  if (size != FINGERPRINT + layout.row_bytes || load<uint64_t>(value) != layout.fingerprint) return FOREIGN;
  for (int64_t i = 0; i < layout.check_count; i++)
    if (!passes(layout.checks[i], value + FINGERPRINT)) return FOREIGN;
  return PRESENT;
}

State decode_row(const RowLayout& layout, const uint8_t* value, int64_t size, uint8_t* row) {
  const State state = read_row(layout, value, size);
  std::memcpy(row, state == PRESENT ? value + FINGERPRINT : layout.default_row, static_cast<size_t>(layout.row_bytes));
  return state;
}

}  // namespace

// Read the reply to an MGET of `count` keys, and the `tail` that must follow it and end what was received.
// `progress` holds how many bytes and values earlier calls with fewer bytes have read; zeros in the first call.
// Returns COMPLETE, with the place and size of each value (-1 if absent), INCOMPLETE, or UNUSUAL, which says nothing
// about the reply except that the caller has to read all of it in another way.
PINRANK_API int32_t pinrank_read_values(const uint8_t* received, int64_t bytes, const char* head, int64_t head_bytes,
                                        int64_t count, const char* tail, int64_t tail_bytes, int64_t size_max,
                                        int64_t* progress, int64_t* starts, int64_t* sizes) {
  int64_t &at = progress[0], &done = progress[1];
  if (at == 0) {
    const Outcome opened = expect(received, bytes, &at, head, head_bytes);
    if (opened != COMPLETE) return opened;
  }
  for (; done < count; done++) {
    const Outcome value = read_value(received, bytes, size_max, &at, starts + done, sizes + done);
    if (value != COMPLETE) return value == INCOMPLETE && bytes > size_max ? UNUSUAL : value;
  }
  int64_t end = at;
  const Outcome ended = expect(received, bytes, &end, tail, tail_bytes);
  return ended == COMPLETE && end < bytes ? UNUSUAL : ended;
}

// Decode `count` values; a value begins `starts[i]` bytes after `base` and has `sizes[i]` bytes, or is absent if that is
// negative. Writes the rows (the default row unless the value is PRESENT) and their states.
// Returns how many are not PRESENT.
PINRANK_API int64_t pinrank_decode_rows(const RowLayout* layout, uintptr_t base, const int64_t* starts,
                                        const int64_t* sizes, int64_t count, uint8_t* rows, uint8_t* states) {
  int64_t unusable = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint8_t* value = reinterpret_cast<const uint8_t*>(base + static_cast<uintptr_t>(starts[i]));
    states[i] = decode_row(*layout, value, sizes[i], rows + i * layout->row_bytes);
    unusable += states[i] != PRESENT;
  }
  return unusable;
}

// Decode one value of `size` bytes, negative if it is absent. The state follows the row.
PINRANK_API void pinrank_decode_row(const RowLayout* layout, const uint8_t* value, int64_t size, uint8_t* row) {
  row[layout->row_bytes] = decode_row(*layout, value, size, row);
}

// Read the newest `length` events of a sequence, newest first, without those after `latest_ms`.
// Writes the events, and to `found` how many they are, how many are after `latest_ms`, and the state.
PINRANK_API void pinrank_newest_events(const uint8_t* fingerprint, uint64_t actions, uint64_t surfaces, uintptr_t value,
                                       int64_t size, int64_t latest_ms, int64_t length, uint8_t* events,
                                       int64_t* found) {
  found[0] = found[1] = 0;
  found[2] = size < 0 ? MISSING : FOREIGN;
  const uint8_t* stored = reinterpret_cast<const uint8_t*>(value);
  if (size < FINGERPRINT || (size - FINGERPRINT) % EVENT || std::memcmp(stored, fingerprint, FINGERPRINT)) return;
  const int64_t count = (size - FINGERPRINT) / EVENT;
  stored += FINGERPRINT;
  for (int64_t i = 0; i < count; i++)
    if (stored[i * EVENT + ACTION] >= actions || stored[i * EVENT + SURFACE] >= surfaces) return;
  found[2] = PRESENT;
  for (int64_t i = count - 1; i >= 0; i--) {
    const uint8_t* event = stored + i * EVENT;
    if (load<int64_t>(event + TIME) > latest_ms) {
      found[1]++;
    } else if (found[0] < length) {
      std::memcpy(events + found[0]++ * EVENT, event, EVENT);
    }
  }
}
