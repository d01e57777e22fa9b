"""The join of what was shown with what became of it."""
