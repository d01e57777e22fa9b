"""Stores of features: bytes by key, in LMDB, Redis or memory."""
