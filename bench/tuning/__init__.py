"""Benchmarks of tuned weights."""
