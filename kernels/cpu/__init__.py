"""The engines of processors: OpenVINO with the native encoder, and NumPy, the reference."""
