"""Ranks one request: picks the model, reads the features, scores the candidates and orders them."""
