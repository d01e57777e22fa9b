"""Loaded models: compiled networks, input tensors, compiled utility tables, and how two versions differ."""
