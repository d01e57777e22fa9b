"""Datasets, training, evaluation and export: how a bundle comes to be. PyTorch lives here and nowhere else."""
