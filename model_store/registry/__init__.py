"""The model store: versions, labels and traffic, kept as objects in a folder or bucket and a history of changes."""
