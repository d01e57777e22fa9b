"""Exports trained networks as bundles and publishes them to the model store."""
