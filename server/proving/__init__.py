"""Tests new model versions before they serve: in an isolated process (the proof), on recent requests, in a warm-up."""
