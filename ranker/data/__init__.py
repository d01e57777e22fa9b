"""From a dataset's files to actions, features and requests."""
