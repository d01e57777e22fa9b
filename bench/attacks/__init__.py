"""Benchmarks of a server that is attacked, crowded, stopped or run for hours: what docs/security.md claims."""
