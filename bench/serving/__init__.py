"""Benchmarks of a whole server."""
