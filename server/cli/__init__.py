"""The `pinrank` command: what people type, and what they read."""
