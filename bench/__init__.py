"""Benchmarks: scripts, their committed results, and the claims of each. See README.md."""
