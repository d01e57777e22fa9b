"""`pinrank data`, `train` and `evaluate`."""
