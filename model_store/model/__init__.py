"""A bundle that can answer: loaded, its tensors assembled, its utility compiled."""
