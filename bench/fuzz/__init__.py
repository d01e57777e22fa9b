"""Thousands of hostile files and streams, against a slow reader that is obviously right."""
