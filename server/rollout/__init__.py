"""Decides which model version answers for each label: follows the model store, compares labels, rolls back bad ones."""
