"""Engines, which run networks on CPUs and GPUs: their contract, and one file per runtime that implements it."""
