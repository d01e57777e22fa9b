"""Feature groups, the stores that hold their rows, and the code that fetches the features of a request."""
