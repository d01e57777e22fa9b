"""Benchmarks of the impression log alone."""
