"""How well bundles rank, how sure that is, and the report of it."""
