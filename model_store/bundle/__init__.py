"""A bundle: its manifest and its files, read without trusting them."""
