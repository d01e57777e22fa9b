"""Keys and values in whole buffers, without a Python object for each, and the native calls that read them."""
