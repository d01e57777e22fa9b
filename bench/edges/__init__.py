"""Benchmarks of what stands between a caller and the server: gRPC itself."""
