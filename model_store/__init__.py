"""Bundles, the store that keeps their versions and labels, and the live models that serve them."""
