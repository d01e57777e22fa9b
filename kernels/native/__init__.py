"""The C++ library: its sources, their compilation, and `library`, which loads it. Its callers lay out the data."""
