"""Measures the producers of embeddings."""
