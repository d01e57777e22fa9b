"""Checks that a new model version is fit to serve: isolated proof, replay of recent requests, warm-up."""
