"""Rankers that a network must be held against: simple scores, and boosted trees on the network's own rows."""
