"""Bundles: a model's manifest and files, read as untrusted input."""
