"""Reads datasets of atomic files, with the TOML files beside them."""
