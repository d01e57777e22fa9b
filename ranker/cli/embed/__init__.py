"""`pinrank embed`: makes vectors of pins, measures them, and refreshes those that rankers read."""
