"""The gRPC port: our own server on uvloop and nghttp2, or grpcio's where that is not built."""
