"""Feature groups, the stores that hold their rows, and the fetch of everything one request needs."""
