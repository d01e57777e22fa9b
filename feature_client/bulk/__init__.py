"""Bulk operations on whole groups: loading them from files, and measuring their coverage."""
