"""Benchmarks: committed scripts, committed results, and the claims that each makes. See README.md."""
