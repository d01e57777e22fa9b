"""The gRPC services and the HTTP endpoints: parse calls, serialise answers, map errors to gRPC statuses."""
