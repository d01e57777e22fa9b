"""Tunes a surface's weights: the most for one party while the others get at least what was asked for."""
