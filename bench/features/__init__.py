"""Benchmarks of feature reads and writes."""
