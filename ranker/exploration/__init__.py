"""Shows what an exploration table would do, before it is served."""
