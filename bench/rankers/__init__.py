"""Rankers as others published them, learning from the rows that ours learn from."""
