"""Decides which requests are scored, when and together: admission, the batch policy, and the engine streams."""
