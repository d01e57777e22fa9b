"""`pinrank train`: the command and its options."""
