"""Benchmarks of networks and kernels alone."""
