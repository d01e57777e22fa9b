"""Whole groups: written from files, and measured for coverage."""
