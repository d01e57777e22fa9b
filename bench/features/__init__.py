"""Benchmarks of reading and writing features."""
