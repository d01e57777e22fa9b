// A gRPC server's side of one HTTP/2 connection, without sockets, threads or clocks: bytes in; events and bytes out.
// nghttp2 does HTTP/2; this file does gRPC over it (github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).

#include <nghttp2/nghttp2.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "exports.h"

namespace {

using std::string;
using std::string_view;

// gRPC's status codes that this file answers with.
constexpr int OK = 0, INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, UNIMPLEMENTED = 12, INTERNAL = 13;
// A message is preceded by a byte that says whether it is compressed, and by its length, big-endian.
constexpr size_t PREFIX_BYTES = 5;
// HTTP/2 counts so many bytes for each header beside its name and value (RFC 9113, 6.5.2).
constexpr size_t HEADER_OVERHEAD = 32;
// Stop to take output from nghttp2 at so many bytes; the caller writes them first.
constexpr size_t OUTPUT_BYTES = 256 << 10;
// Messages of a stream that its handler has not taken yet: beyond so many bytes the client must wait.
constexpr size_t UNTAKEN_BYTES = 256 << 10;
// What a connection remembers of its calls' credentials, each with so much for itself.
constexpr size_t CREDENTIALS_BYTES = 24 << 10, CREDENTIALS_OVERHEAD = 400;
// What a message of a stream costs until its handler is done with it, beside its own bytes.
constexpr size_t MESSAGE_OVERHEAD = 100;
// What a call costs beside its bytes: this library's and nghttp2's memory for it, and its handler's.
constexpr size_t CALL_BYTES = 4 << 10;
// What one call may have beside its largest message.
constexpr size_t ONE_CALL_BYTES = 64 << 10;
enum Kind : int64_t { CALL = 1, MESSAGE = 2, REQUEST_ENDED = 3, CLOSED = 4, BEGUN = 5, SENT = 6 };

// What happened on a stream. `address`, `size` and `compressed` describe a message: of a call whose method takes one
// message, CALL has it, and BEGUN comes before it if its bytes did not come at once. An address is valid until the next
// call of `pinrank_h2_receive` or `pinrank_h2_send`. `credentials` is the same number for all calls of a connection that
// have the same credentials: 0 for none, -1 if they are too long to be remembered. Its upper half changes when all
// numbers before were forgotten; none comes again.
struct Event {
  int64_t kind, stream, method, timeout_us, address, size, compressed, credentials;
};

// What all connections of a server share.
struct Endpoint {
  std::unordered_map<string, int> methods;
  std::vector<bool> takes_stream;
  // Names of the metadata that say who calls.
  std::vector<string> credential_names;
  size_t message_bytes_max, header_bytes_max, kept_bytes_max, all_kept_bytes_max;
  // The bytes that all connections keep.
  mutable size_t all_kept_bytes = 0;
  uint32_t streams_max;
  int32_t window_bytes;
  nghttp2_session_callbacks* callbacks = nullptr;
  nghttp2_option* options = nullptr;

  ~Endpoint() {
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_option_del(options);
  }
};

struct Call {
  int32_t stream;
  int method = -1;
  int64_t timeout_us = -1;
  bool bad_timeout = false, is_grpc = false;
  // Whether the caller of this library knows of it, and whether it has been answered.
  bool told = false, answered = false;
  bool request_ended = false, headers_sent = false, deferred = false, failed = false;
  size_t header_bytes = 0;
  string path;
  // name, 0, value, 0, and so on.
  string metadata;
  // That of `credential_names`, until its number is known.
  string credentials;
  int64_t credentials_number = 0;
  // What is counted in the connection's kept bytes for the call itself with its metadata, and for messages that its
  // handler is not done with.
  size_t kept_call = 0, kept_messages = 0;
  // Received bytes that are no whole message yet; for a method that takes one message, all of them.
  string received;
  size_t untaken = 0, owed = 0;
  // Bytes to send, and how many of them are sent.
  string answer;
  size_t sent = 0;
  // The trailers: name, 0, value, 0, and so on.
  string trailers;
};

// Memory that the caller of this library reads after each call.
struct View {
  int64_t events, event_count, output, output_bytes, more_output, is_open, settings_received, resets;
};

struct Connection {
  const Endpoint* endpoint;
  nghttp2_session* session = nullptr;
  std::unordered_map<int32_t, std::unique_ptr<Call>> calls;
  std::vector<Event> events;
  // Calls whose headers came with the bytes that are being received.
  std::vector<int32_t> begun;
  // A deque, as its strings stay where they are when others join them.
  std::deque<string> messages;
  string output;
  // The bytes of all calls: `kept_call`, `kept_messages`, and those in `received` and `answer`.
  size_t kept_bytes = 0;
  bool settings_received = false;
  // Numbers of credentials, their bytes, and how often they were forgotten.
  std::unordered_map<string, int64_t> credentials;
  size_t credentials_bytes = 0;
  int64_t credentials_forgotten = 0;
  // Calls that ended before they were answered: the client gave them up, or made nghttp2 do so (CVE-2023-44487,
  // CVE-2025-8671).
  int64_t resets = 0;
  View view = {};

  ~Connection() {
    nghttp2_session_del(session);
    drop(kept_bytes);
  }

  // A connection with more than one large message may hold no more than is left, so that it cannot take the last of it.
  bool has_room(size_t size) const {
    const size_t own = kept_bytes + size, all = endpoint->all_kept_bytes + size, most = endpoint->all_kept_bytes_max;
    return own <= endpoint->kept_bytes_max && all <= most &&
           (own + all <= most || own <= endpoint->message_bytes_max + ONE_CALL_BYTES);
  }

  void keep(size_t size) {
    kept_bytes += size;
    endpoint->all_kept_bytes += size;
  }

  void drop(size_t size) {
    kept_bytes -= size;
    endpoint->all_kept_bytes -= size;
  }

  Call* call(int32_t stream) {
    const auto found = calls.find(stream);
    return found == calls.end() ? nullptr : found->second.get();
  }

  int64_t number_of(const string& given) {
    if (given.empty()) return 0;
    if (const auto found = credentials.find(given); found != credentials.end()) return found->second;
    const size_t size = given.size() + CREDENTIALS_OVERHEAD;
    if (size > CREDENTIALS_BYTES) return -1;
    if (credentials_bytes + size > CREDENTIALS_BYTES) {
      credentials.clear();
      credentials_bytes = 0;
      credentials_forgotten++;
    }
    credentials_bytes += size;
    return credentials[given] = credentials_forgotten << 32 | (int64_t)(credentials.size() + 1);
  }

  void tell(Kind kind, Call& call, int64_t address = 0, int64_t size = 0, int64_t compressed = 0) {
    call.told = true;
    events.push_back(
        {kind, call.stream, call.method, call.timeout_us, address, size, compressed, call.credentials_number});
  }
};

Connection& of(void* user_data) { return *static_cast<Connection*>(user_data); }

nghttp2_nv header(string_view name, string_view value) {
  return {(uint8_t*)name.data(), (uint8_t*)value.data(), name.size(), value.size(), NGHTTP2_NV_FLAG_NONE};
}

// Appends the headers in `block` (name, 0, value, 0, and so on).
void append(std::vector<nghttp2_nv>& headers, const string& block) {
  for (size_t at = 0; at < block.size();) {
    const string_view name(block.c_str() + at);
    const string_view value(block.c_str() + at + name.size() + 1);
    headers.push_back(header(name, value));
    at += name.size() + value.size() + 2;
  }
}

ssize_t read_answer(nghttp2_session* session, int32_t stream, uint8_t* to, size_t room, uint32_t* flags,
                    nghttp2_data_source* source, void* user_data) {
  Call& call = *static_cast<Call*>(source->ptr);
  Connection& connection = of(user_data);
  const size_t size = std::min(room, call.answer.size() - call.sent);
  std::memcpy(to, call.answer.data() + call.sent, size);
  call.sent += size;
  if (call.sent < call.answer.size()) return (ssize_t)size;
  connection.drop(call.answer.size());
  call.answer.clear();
  call.sent = 0;
  if (size > 0 && !call.answered) connection.tell(SENT, call);
  if (call.answered) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    std::vector<nghttp2_nv> trailers;
    append(trailers, call.trailers);
    if (nghttp2_submit_trailer(session, stream, trailers.data(), trailers.size())) return NGHTTP2_ERR_CALLBACK_FAILURE;
  } else if (size == 0) {
    call.deferred = true;
    return NGHTTP2_ERR_DEFERRED;
  }
  return (ssize_t)size;
}

// Sends the response's headers, and whatever of the answer there is or will be.
int start_response(Connection& connection, Call& call) {
  call.headers_sent = true;
  const nghttp2_nv headers[] = {header(":status", "200"), header("content-type", "application/grpc")};
  const nghttp2_data_provider provider = {{.ptr = &call}, read_answer};
  return nghttp2_submit_response(connection.session, call.stream, headers, 2, &provider);
}

int end(Connection& connection, Call& call, int code, string_view message, string_view more = {}) {
  if (call.answered) return 0;
  call.answered = true;
  call.trailers.append("grpc-status").push_back(0);
  call.trailers.append(std::to_string(code)).push_back(0);
  if (!message.empty()) {
    call.trailers.append("grpc-message").push_back(0);
    call.trailers.append(message).push_back(0);
  }
  call.trailers.append(more);
  if (call.headers_sent) {
    if (!call.deferred) return 0;
    call.deferred = false;
    return nghttp2_session_resume_data(connection.session, call.stream);
  }
  if (!call.answer.empty()) return start_response(connection, call);
  std::vector<nghttp2_nv> headers = {header(":status", "200"), header("content-type", "application/grpc")};
  append(headers, call.trailers);
  return nghttp2_submit_response(connection.session, call.stream, headers.data(), headers.size(), nullptr);
}

// Ends a call whose request cannot be understood. If its handler runs, CLOSED will tell it.
int fail(Connection& connection, Call& call, int code, string_view message) {
  call.failed = true;
  connection.drop(call.received.size());
  call.received.clear();
  return end(connection, call, code, message);
}

void append_message(Connection& connection, Call& call, const uint8_t* message, size_t size) {
  const uint8_t prefix[PREFIX_BYTES] = {0, (uint8_t)(size >> 24), (uint8_t)(size >> 16), (uint8_t)(size >> 8),
                                        (uint8_t)size};
  call.answer.append((const char*)prefix, PREFIX_BYTES).append((const char*)message, size);
  connection.keep(PREFIX_BYTES + size);
}

// Returns the microseconds of a grpc-timeout, at most 8 digits and a unit; -1 if it is malformed.
int64_t timeout_us(string_view value) {
  if (value.size() < 2 || value.size() > 9) return -1;
  int64_t count = 0;
  for (const char digit : value.substr(0, value.size() - 1)) {
    if (digit < '0' || digit > '9') return -1;
    count = count * 10 + (digit - '0');
  }
  switch (value.back()) {
    case 'H':
      return count * 3600000000;
    case 'M':
      return count * 60000000;
    case 'S':
      return count * 1000000;
    case 'm':
      return count * 1000;
    case 'u':
      return count;
    case 'n':
      return count / 1000;
    default:
      return -1;
  }
}

int on_begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
  if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
  auto call = std::make_unique<Call>();
  call->stream = frame->hd.stream_id;
  of(user_data).calls[frame->hd.stream_id] = std::move(call);
  return 0;
}

int on_header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name_bytes, size_t name_size,
              const uint8_t* value_bytes, size_t value_size, uint8_t, void* user_data) {
  Connection& connection = of(user_data);
  Call* const call = connection.call(frame->hd.stream_id);
  if (call == nullptr || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;  // a request's trailers say nothing
  const string_view name((const char*)name_bytes, name_size), value((const char*)value_bytes, value_size);
  call->header_bytes += name_size + value_size + HEADER_OVERHEAD;
  if (call->header_bytes > connection.endpoint->header_bytes_max)
    // A few references to a long entry of the compression's table make megabytes: stop to look at them.
    return call->header_bytes > 4 * connection.endpoint->header_bytes_max ? NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE : 0;
  if (name == ":path") {
    call->path = value;
  } else if (name == "content-type") {
    call->is_grpc = value == "application/grpc" || value.starts_with("application/grpc+") ||
                    value.starts_with("application/grpc;");
  } else if (name == "grpc-timeout") {
    call->timeout_us = timeout_us(value);
    call->bad_timeout = call->timeout_us < 0;
  }
  if (name[0] != ':') {
    call->metadata.append(name).push_back(0);
    call->metadata.append(value).push_back(0);
    const auto& names = connection.endpoint->credential_names;
    if (std::find(names.begin(), names.end(), name) != names.end()) {
      call->credentials.append(name).push_back(0);
      call->credentials.append(value).push_back(0);
    }
  }
  return 0;
}

// Looks at a call whose headers are complete.
int begin(Connection& connection, Call& call) {
  const Endpoint& endpoint = *connection.endpoint;
  if (call.header_bytes > endpoint.header_bytes_max)
    return fail(connection, call, RESOURCE_EXHAUSTED,
                "the metadata exceeds " + std::to_string(endpoint.header_bytes_max) + " bytes");
  if (!connection.has_room(CALL_BYTES + call.metadata.size()))
    return fail(connection, call, RESOURCE_EXHAUSTED, "too many bytes are in unanswered calls");
  call.kept_call = CALL_BYTES + call.metadata.size();
  connection.keep(call.kept_call);
  call.credentials_number = connection.number_of(std::exchange(call.credentials, {}));
  if (!call.is_grpc) {
    call.answered = call.failed = true;
    const nghttp2_nv unsupported[] = {header(":status", "415")};
    return nghttp2_submit_response(connection.session, call.stream, unsupported, 1, nullptr);
  }
  if (call.bad_timeout) return fail(connection, call, INVALID_ARGUMENT, "grpc-timeout is malformed");
  const auto method = endpoint.methods.find(call.path);
  if (method == endpoint.methods.end()) return fail(connection, call, UNIMPLEMENTED, "Method not found!");
  call.method = method->second;
  if (endpoint.takes_stream[(size_t)call.method]) {
    connection.tell(CALL, call);
  } else {
    connection.begun.push_back(call.stream);
  }
  return 0;
}

// What a message of a stream costs until its handler is done with it.
size_t cost_of(size_t size) { return MESSAGE_OVERHEAD + size; }

// Takes whole messages out of the received bytes, for a method that takes a stream of them.
int take_messages(Connection& connection, Call& call) {
  size_t at = 0;
  while (call.received.size() - at >= PREFIX_BYTES) {
    const auto* prefix = (const uint8_t*)call.received.data() + at;
    const size_t size = (size_t)prefix[1] << 24 | (size_t)prefix[2] << 16 | (size_t)prefix[3] << 8 | prefix[4];
    if (size > connection.endpoint->message_bytes_max)
      return fail(connection, call, RESOURCE_EXHAUSTED,
                  "Received message larger than max (" + std::to_string(size) + " vs. " +
                      std::to_string(connection.endpoint->message_bytes_max) + ")");
    if (prefix[0] > 1) return fail(connection, call, INTERNAL, "a message's prefix is malformed");
    if (!connection.endpoint->takes_stream[(size_t)call.method]) return 0;  // the whole request comes with its end
    if (call.received.size() - at - PREFIX_BYTES < size) break;
    connection.messages.push_back(call.received.substr(at + PREFIX_BYTES, size));
    call.untaken += size + MESSAGE_OVERHEAD;
    call.kept_messages += cost_of(size);
    connection.keep(cost_of(size));
    connection.tell(MESSAGE, call, (int64_t)connection.messages.back().data(), (int64_t)size, prefix[0]);
    at += PREFIX_BYTES + size;
  }
  call.received.erase(0, at);
  connection.drop(at);
  return 0;
}

int end_request(Connection& connection, Call& call) {
  call.request_ended = true;
  if (call.failed) return 0;
  const string& received = call.received;
  if (connection.endpoint->takes_stream[(size_t)call.method]) {
    if (!received.empty()) return fail(connection, call, INTERNAL, "the last message is cut off");
    connection.tell(REQUEST_ENDED, call);
    return 0;
  }
  if (received.empty()) return fail(connection, call, UNIMPLEMENTED, "this method takes one message, and none came");
  size_t size = 0;
  if (received.size() >= PREFIX_BYTES) {
    const auto* prefix = (const uint8_t*)received.data();
    size = (size_t)prefix[1] << 24 | (size_t)prefix[2] << 16 | (size_t)prefix[3] << 8 | prefix[4];
  }
  if (received.size() < PREFIX_BYTES + size) return fail(connection, call, INTERNAL, "the message is cut off");
  if (received.size() > PREFIX_BYTES + size)
    return fail(connection, call, UNIMPLEMENTED, "this method takes one message, and more came");
  connection.tell(CALL, call, (int64_t)(received.data() + PREFIX_BYTES), (int64_t)size, received[0]);
  return 0;
}

int on_frame_recv(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
  Connection& connection = of(user_data);
  if (frame->hd.type == NGHTTP2_SETTINGS) connection.settings_received = true;
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  Call* const call = connection.call(frame->hd.stream_id);
  if (call == nullptr) return 0;
  if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST && begin(connection, *call))
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM && end_request(connection, *call)) return NGHTTP2_ERR_CALLBACK_FAILURE;
  return 0;
}

int on_data_chunk_recv(nghttp2_session* session, uint8_t, int32_t stream, const uint8_t* data, size_t size,
                       void* user_data) {
  Connection& connection = of(user_data);
  if (nghttp2_session_consume_connection(session, size)) return NGHTTP2_ERR_CALLBACK_FAILURE;
  Call* const call = connection.call(stream);
  if (call == nullptr || call->failed) return 0;
  if (!connection.has_room(size))
    return fail(connection, *call, RESOURCE_EXHAUSTED, "too many bytes are in unanswered calls")
               ? NGHTTP2_ERR_CALLBACK_FAILURE
               : 0;
  connection.keep(size);
  call->received.append((const char*)data, size);
  // A prefix bounds what follows it, so that at most one message and what nghttp2 hands over at once are kept.
  if (take_messages(connection, *call)) return NGHTTP2_ERR_CALLBACK_FAILURE;
  if (!call->failed && call->received.size() > PREFIX_BYTES + connection.endpoint->message_bytes_max &&
      fail(connection, *call, UNIMPLEMENTED, "this method takes one message, and more came"))
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  if (call->failed) return 0;
  call->owed += size;
  if (call->untaken <= UNTAKEN_BYTES && nghttp2_session_consume_stream(session, stream, std::exchange(call->owed, 0)))
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  return 0;
}

int on_frame_send(nghttp2_session* session, const nghttp2_frame* frame, void* user_data) {
  if (frame->hd.type != NGHTTP2_HEADERS || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) return 0;
  Call* const call = of(user_data).call(frame->hd.stream_id);
  // The answer is complete and the request is not: the client need not go on (RFC 9113, 8.1).
  if (call != nullptr && !call->request_ended)
    return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, call->stream, NGHTTP2_NO_ERROR)
               ? NGHTTP2_ERR_CALLBACK_FAILURE
               : 0;
  return 0;
}

int on_stream_close(nghttp2_session*, int32_t stream, uint32_t, void* user_data) {
  Connection& connection = of(user_data);
  if (Call* const call = connection.call(stream)) {
    connection.resets += !call->answered;
    connection.drop(call->kept_call + call->kept_messages + call->received.size() + call->answer.size());
    // Its message must outlive it: the caller of this library has not looked at the events yet.
    connection.messages.push_back(std::move(call->received));
    for (Event& event : connection.events)
      if (event.stream == stream && event.kind == CALL && event.size)
        event.address = (int64_t)(connection.messages.back().data() + PREFIX_BYTES);
    if (call->told) connection.tell(CLOSED, *call);
    connection.calls.erase(stream);
  }
  return 0;
}

// A status that is too long for a frame of headers is not sent, and the call must end all the same.
int on_frame_not_send(nghttp2_session* session, const nghttp2_frame* frame, int, void*) {
  if (frame->hd.type != NGHTTP2_HEADERS) return 0;
  nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_INTERNAL_ERROR);
  return 0;
}

// Options that nghttp2 has only since 1.50 and 1.57, and as a security update in older versions of Debian.
template <class Option>
void set_newer_options(Option* option) {
  // The caller of this library counts resets itself, so that an attack is seen.
  if constexpr (requires { nghttp2_option_set_stream_reset_rate_limit(option, UINT64_MAX, UINT64_MAX); })
    nghttp2_option_set_stream_reset_rate_limit(option, UINT64_MAX, UINT64_MAX);
  // A client may send an empty token, "Bearer ".
  if constexpr (requires { nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(option, 1); })
    nghttp2_option_set_no_rfc9113_leading_and_trailing_ws_validation(option, 1);
}

int64_t show(Connection& connection) {
  nghttp2_session* const session = connection.session;
  connection.view = {(int64_t)connection.events.data(), (int64_t)connection.events.size(),
                     (int64_t)connection.output.data(), (int64_t)connection.output.size(),
                     connection.output.size() >= OUTPUT_BYTES,
                     nghttp2_session_want_read(session) || nghttp2_session_want_write(session),
                     connection.settings_received,
                     connection.resets};
  return connection.view.event_count;
}

}  // namespace

PINRANK_API const char* pinrank_sources() { return PINRANK_SOURCES; }

// Creates what a server's connections share. `paths` are `/service/method`, each ended by a 0; `takes_stream[i]` says
// whether method i takes a stream of messages. `credential_names` are those of the metadata that says who calls.
PINRANK_API Endpoint* pinrank_h2_endpoint(int64_t methods, const char* paths, const uint8_t* takes_stream,
                                          int64_t credentials, const char* credential_names,
                                          int64_t message_bytes_max, int64_t header_bytes_max, int64_t kept_bytes_max,
                                          int64_t all_kept_bytes_max, int64_t streams_max, int64_t window_bytes) {
  auto endpoint = std::make_unique<Endpoint>();
  for (int64_t i = 0; i < methods; i++) {
    const string path(paths);
    paths += path.size() + 1;
    endpoint->methods[path] = (int)i;
    endpoint->takes_stream.push_back(takes_stream[i]);
  }
  for (int64_t i = 0; i < credentials; i++) {
    endpoint->credential_names.emplace_back(credential_names);
    credential_names += endpoint->credential_names.back().size() + 1;
  }
  endpoint->message_bytes_max = (size_t)message_bytes_max;
  endpoint->header_bytes_max = (size_t)header_bytes_max;
  endpoint->kept_bytes_max = (size_t)kept_bytes_max;
  endpoint->all_kept_bytes_max = (size_t)all_kept_bytes_max;
  endpoint->streams_max = (uint32_t)streams_max;
  endpoint->window_bytes = (int32_t)window_bytes;
  if (nghttp2_session_callbacks_new(&endpoint->callbacks) || nghttp2_option_new(&endpoint->options)) return nullptr;
  nghttp2_session_callbacks_set_on_begin_headers_callback(endpoint->callbacks, on_begin_headers);
  nghttp2_session_callbacks_set_on_header_callback(endpoint->callbacks, on_header);
  nghttp2_session_callbacks_set_on_frame_recv_callback(endpoint->callbacks, on_frame_recv);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(endpoint->callbacks, on_data_chunk_recv);
  nghttp2_session_callbacks_set_on_frame_send_callback(endpoint->callbacks, on_frame_send);
  nghttp2_session_callbacks_set_on_frame_not_send_callback(endpoint->callbacks, on_frame_not_send);
  nghttp2_session_callbacks_set_on_stream_close_callback(endpoint->callbacks, on_stream_close);
  nghttp2_option_set_no_auto_window_update(endpoint->options, 1);
  set_newer_options(endpoint->options);
  return endpoint.release();
}

PINRANK_API void pinrank_h2_endpoint_free(Endpoint* endpoint) { delete endpoint; }

// Creates a connection; its memory for the caller to read is at `*view`.
PINRANK_API Connection* pinrank_h2_connect(const Endpoint* endpoint, View** view) {
  auto connection = std::make_unique<Connection>();
  connection->endpoint = endpoint;
  if (nghttp2_session_server_new2(&connection->session, endpoint->callbacks, connection.get(), endpoint->options))
    return nullptr;
  const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, endpoint->streams_max},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, (uint32_t)endpoint->window_bytes},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, (uint32_t)endpoint->header_bytes_max},
  };
  // The connection's window need not hold clients back: the windows of its streams do.
  if (nghttp2_submit_settings(connection->session, NGHTTP2_FLAG_NONE, settings, 3) ||
      nghttp2_session_set_local_window_size(connection->session, NGHTTP2_FLAG_NONE, 0, NGHTTP2_MAX_WINDOW_SIZE))
    return nullptr;
  *view = &connection->view;
  show(*connection);
  return connection.release();
}

PINRANK_API void pinrank_h2_free(Connection* connection) { delete connection; }

// Takes received bytes. Returns the number of events, or -1 if the peer does not speak HTTP/2: write the output, then
// close.
PINRANK_API int64_t pinrank_h2_receive(Connection* connection, const uint8_t* data, int64_t size) {
  connection->events.clear();
  connection->messages.clear();
  connection->begun.clear();
  const ssize_t taken = nghttp2_session_mem_recv(connection->session, data, (size_t)size);
  for (const int32_t stream : connection->begun) {
    Call* const call = connection->call(stream);
    if (call != nullptr && !call->told && !call->failed) connection->tell(BEGUN, *call);
  }
  const int64_t events = show(*connection);
  return taken == (ssize_t)size ? events : -1;
}

// Makes the next bytes to write visible, and the events of streams that end with them. Call again if there are more.
// Returns the number of events, or -1 if the connection is broken.
PINRANK_API int64_t pinrank_h2_send(Connection* connection) {
  connection->events.clear();
  connection->messages.clear();
  connection->output.clear();
  while (connection->output.size() < OUTPUT_BYTES) {
    const uint8_t* data;
    const ssize_t size = nghttp2_session_mem_send(connection->session, &data);
    if (size < 0) return -1;
    if (size == 0) break;
    connection->output.append((const char*)data, (size_t)size);
  }
  return show(*connection);
}

// Sends one message of an answer that may have several.
PINRANK_API void pinrank_h2_message(Connection* connection, int32_t stream, const uint8_t* message, int64_t size) {
  Call* const call = connection->call(stream);
  if (call == nullptr || call->answered) return;
  append_message(*connection, *call, message, (size_t)size);
  if (!call->headers_sent) {
    start_response(*connection, *call);
  } else if (std::exchange(call->deferred, false)) {
    nghttp2_session_resume_data(connection->session, stream);
  }
}

// Answers with one message and status OK.
PINRANK_API void pinrank_h2_answer(Connection* connection, int32_t stream, const uint8_t* message, int64_t size) {
  Call* const call = connection->call(stream);
  if (call == nullptr || call->answered) return;
  append_message(*connection, *call, message, (size_t)size);
  end(*connection, *call, OK, {});
}

// Ends a call with a status. `message` is percent-encoded; `trailers` are further ones: name, 0, value, 0, and so on.
PINRANK_API void pinrank_h2_end(Connection* connection, int32_t stream, int32_t code, const char* message,
                                const char* trailers, int64_t trailers_size) {
  if (Call* const call = connection->call(stream))
    end(*connection, *call, code, message, string_view(trailers, (size_t)trailers_size));
}

// Gives up a call, whatever of its answer is still to be sent.
PINRANK_API void pinrank_h2_reset(Connection* connection, int32_t stream) {
  if (connection->call(stream) != nullptr)
    nghttp2_submit_rst_stream(connection->session, NGHTTP2_FLAG_NONE, stream, NGHTTP2_CANCEL);
}

// Counts further bytes for a call's message, such as what it is when decompressed. Returns whether there is room.
PINRANK_API int32_t pinrank_h2_keep(Connection* connection, int32_t stream, int64_t size) {
  Call* const call = connection->call(stream);
  if (call == nullptr || !connection->has_room((size_t)size)) return 0;
  call->kept_messages += (size_t)size;
  connection->keep((size_t)size);
  return 1;
}

// Gives a client's stream room for further messages, after its handler is done with one. `kept` is what was counted for
// it by `pinrank_h2_keep`.
PINRANK_API void pinrank_h2_taken(Connection* connection, int32_t stream, int64_t size, int64_t kept) {
  Call* const call = connection->call(stream);
  if (call == nullptr) return;
  call->untaken -= (size_t)size + MESSAGE_OVERHEAD;
  const size_t cost = cost_of((size_t)size) + (size_t)kept;
  call->kept_messages -= cost;
  connection->drop(cost);
  if (!call->failed && call->untaken <= UNTAKEN_BYTES && call->owed)
    nghttp2_session_consume_stream(connection->session, stream, std::exchange(call->owed, 0));
}

// Returns whether a call is in progress.
PINRANK_API int32_t pinrank_h2_is_open(Connection* connection, int32_t stream) {
  return connection->call(stream) != nullptr;
}

// Returns where a call's metadata is (name, 0, value, 0, and so on) and how long; null for an unknown stream.
PINRANK_API const char* pinrank_h2_metadata(Connection* connection, int32_t stream, int64_t* size) {
  const Call* const call = connection->call(stream);
  *size = call ? (int64_t)call->metadata.size() : 0;
  return call ? call->metadata.data() : nullptr;
}

// Announces that the connection will take no further calls; those on their way are still taken.
PINRANK_API void pinrank_h2_retire(Connection* connection) { nghttp2_submit_shutdown_notice(connection->session); }

// Takes no further calls: clients send them, and those that came too late, over another connection. `calm` tells a
// client that it asked for too much.
PINRANK_API void pinrank_h2_go_away(Connection* connection, int32_t calm) {
  nghttp2_session* const session = connection->session;
  nghttp2_submit_goaway(session, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session),
                        calm ? NGHTTP2_ENHANCE_YOUR_CALM : NGHTTP2_NO_ERROR, nullptr, 0);
}
