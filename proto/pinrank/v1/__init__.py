"""Version 1 of the wire: messages in `*_pb2`, service stubs in `*_pb2_grpc`. Regenerate with `make proto`."""
