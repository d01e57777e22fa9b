"""The impression log and its join."""
