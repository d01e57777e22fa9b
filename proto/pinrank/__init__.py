"""The gRPC API of pinrank. `pinrank.v1` holds the generated protobuf code; `channels` opens client channels."""
