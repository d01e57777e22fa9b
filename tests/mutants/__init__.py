"""Whether the tests notice small faults of the pure files: `make mutants`."""
