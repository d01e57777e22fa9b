"""Fuzzing: thousands of hostile files and streams, compared with a slow and obviously correct reader."""
