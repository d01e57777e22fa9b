"""Looking at a log: how much of what it holds, and whether it is sound."""
