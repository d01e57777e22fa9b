"""Benchmarks of a complete server."""
