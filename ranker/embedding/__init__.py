"""Producers of embeddings: from a log of actions to vectors of pins and users, in spaces that are known by content."""
