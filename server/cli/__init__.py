"""The `pinrank` command: its arguments, its help and its output."""
