"""Mutation testing of the pure files, which shows whether their tests notice small faults: `make mutants`."""
