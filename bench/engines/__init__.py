"""Benchmarks of networks and kernels, without a server."""
