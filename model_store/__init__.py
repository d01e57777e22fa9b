"""Models: bundles, the store of their versions and labels, and loaded models that score requests."""
