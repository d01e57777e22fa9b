"""Engines for CPUs, one file each. NumPy is the reference that every engine is tested against."""
